"""Artifact: a folder that carries its own proof.

``flabc.json`` names what the folder is, what it was made from and with, what was checked, and the sha256 of every
other file. A folder appears whole or not at all: it is written beside its place and then renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from flabc.console import note
from flabc.errors import ArtifactError, EngineError, UsageError
from flabc.frozen import Frozen
from flabc.spec import ModelSpec

MANIFEST = "flabc.json"
SCHEMA_VERSION = 1

#: In an engine: the graph that serves, and the one that gives logits at every position, on the same weights.
GRAPH, SCORING_GRAPH = "model.onnx", "score.onnx"

#: A graph's note of what its matrices are multiplied with, for runtimes that leave it to be said.
ACTIVATIONS_NOTE = "flabc.activations"

#: For TensorRT: what it builds of these two graphs, and how.
ENGINE, SCORING_ENGINE, BUILD_PLAN = "model.plan", "score.plan", "build_plan.json"

#: Packages whose version can change a result.
_RECORDED = (
    "flabc",
    "gguf",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "peft",
    "tensorrt",
    "tokenizers",
    "torch",
    "transformers",
)

#: An ``engine`` runs in ONNX Runtime, OpenVINO or TensorRT, a ``gguf`` in llama.cpp.
Kind = Literal["checkpoint", "engine", "gguf", "report"]


class SourceRecord(Frozen):
    """What an artifact was made from: a name a person knows, and the sha256 of each file that was read."""

    name: str
    files: dict[str, str] = Field({})


class Manifest(Frozen):
    """The content of ``flabc.json``. ``target`` is what an engine was exported to."""

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    target: str | None = None
    created: datetime
    spec: ModelSpec | None = None
    recipe: dict[str, Any] | None = None
    source: SourceRecord | None = None
    seed: int | None = None
    versions: dict[str, str] = Field({})
    receipts: dict[str, Any] = Field({})
    files: dict[str, str] = Field({})


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, verified when opened."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str, kind: Kind | None = None) -> Artifact:
        """Open a folder and verify every file against the manifest.

        Raises:
            ArtifactError: if the folder is not an artifact, is of another kind or schema, or if a file is missing,
                changed, or cannot be read; the file is named.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if kind is not None and manifest.kind != kind:
            raise ArtifactError(f"{path} is of the wrong kind.", expected=f"kind {kind!r}", found=f"{manifest.kind!r}")
        for name, digest in manifest.files.items():
            _verify(path, name, digest)
        return cls(path, manifest)

    @property
    def model(self) -> ModelSpec:
        """The shapes of the model that flabc can run from this folder.

        Raises:
            EngineError: if it holds none, or one that only llama.cpp runs.
        """
        if self.manifest.kind == "gguf":
            raise EngineError(
                f"{self.path} is for llama.cpp; flabc does not run it.",
                fix=f"Run: llama-cli -m {self.path}/*.gguf. Or give the .gguf file to flabc inspect, compress or eval.",
            )
        if self.manifest.kind == "report" or self.manifest.spec is None:
            raise EngineError(f"{self.path} is a {self.manifest.kind}, which cannot be run.")
        return self.manifest.spec

    @staticmethod
    def is_at(path: Path | str) -> bool:
        """Whether a folder claims to be an artifact."""
        return (Path(path) / MANIFEST).is_file()


@dataclass
class Draft:
    """An artifact being written. Files go into ``path``; the fields end up in the manifest."""

    path: Path
    kind: Kind
    target: str | None = None
    spec: ModelSpec | None = None
    recipe: dict[str, Any] | None = None
    source: SourceRecord | None = None
    seed: int | None = None
    receipts: dict[str, Any] = field(default_factory=dict)

    def follow(self, made: Manifest) -> None:
        """Be made of another artifact: by its recipe, of its source, with its receipts."""
        self.recipe, self.source, self.seed, self.receipts = made.recipe, made.source, made.seed, dict(made.receipts)

    def write_manifest(self) -> None:
        """Hash every file and write ``flabc.json``."""
        files = {
            file.relative_to(self.path).as_posix(): sha256(file)
            for file in sorted(self.path.rglob("*"))
            if file.is_file()
        }
        manifest = Manifest(
            kind=self.kind,
            target=self.target,
            created=datetime.now(UTC).replace(microsecond=0),
            spec=self.spec,
            recipe=self.recipe,
            source=self.source,
            seed=self.seed,
            versions=library_versions(),
            receipts=self.receipts,
            files=files,
        )
        (self.path / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def partial_of(out: Path | str) -> Path:
    """Where what is not finished lies of a folder that will be made."""
    return Path(f"{Path(out).absolute()}.partial")


@contextmanager
def unfinished(out: Path | str | None, identity: Mapping[str, Any], *, force: bool = False) -> Iterator[Path]:
    """Yield a folder for what is not finished, ``OUT.partial``, in which the same run finds again what it had done.

    It is removed when the block ends well, or before anything was done. Without ``out`` it is a temporary one.

    Args:
        out: the folder that will be made of it.
        identity: what the content depends on, as JSON; a run with another identity may not go on with it.
        force: begin anew.

    Raises:
        UsageError: if a run with another identity was cut off there.
    """
    if out is None:
        with tempfile.TemporaryDirectory(prefix="flabc-") as temporary:
            yield Path(temporary)
        return
    folder = partial_of(out)
    known, content = folder / "run.json", json.dumps(identity, indent=1)
    if known.is_file() and known.read_text(encoding="utf-8") == content and not force:
        note(f"going on with {folder}")
    elif folder.exists() and not force:
        raise UsageError(
            f"{folder} holds an unfinished run with other models or options.",
            fix="Give another -o, or --force to begin anew.",
        )
    else:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        known.write_text(content, encoding="utf-8")
    try:
        yield folder
    except BaseException:
        if not any(file.is_file() for file in folder.rglob("*") if file != known):  # nothing to go on with
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextmanager
def create(out: Path | str, kind: Kind, *, force: bool = False) -> Iterator[Draft]:
    """Yield a ``Draft`` in a temporary sibling of ``out``; on success it takes the place of ``out`` at once.

    Whatever ends the block early (an error, Ctrl-C, kill -9) leaves ``out`` as it was. The sibling is removed
    then, or, after a kill -9, by the next writer of the same folder.

    Args:
        out: the folder to make.
        kind: what it will hold.
        force: replace a folder that exists and is not empty.

    Raises:
        ArtifactError: if the folder exists, is not empty, and ``force`` is not given.
    """
    out = Path(out).absolute()
    check_free(out, force=force)
    out.parent.mkdir(parents=True, exist_ok=True)
    _sweep(out)
    draft = Draft(path=_sibling(out), kind=kind)
    draft.path.mkdir()
    try:
        yield draft
        draft.write_manifest()
        _put_in_place(draft.path, out)
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


def check_free(out: Path | str, *, force: bool) -> None:
    """Make sure that a folder may be written: call it before long work begins.

    Raises:
        ArtifactError: if it is a file, or a folder that is not empty and ``force`` is not given.
    """
    out = Path(out)
    if out.is_file():
        raise ArtifactError(f"{out} is a file.", expected="a folder or a name that is free")
    if not force and out.is_dir() and any(out.iterdir()):
        raise ArtifactError(
            f"The output folder {out} exists and is not empty.",
            fix="Choose another, or pass --force to replace it.",
        )


def write_whole(file: Path, text: str) -> None:
    """Write a file as a whole, or, if that is cut off, leave what was there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def library_versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that can change a result."""
    versions = {"python": sys.version.split()[0]}
    for name in _RECORDED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_manifest(path: Path) -> Manifest:
    """What a folder says of itself, its files unverified.

    Raises:
        ArtifactError: if it is no artifact, or of another schema.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ArtifactError(f"{path} is not a flabc artifact.", expected=f"a folder with {MANIFEST}")
    try:
        text = file.read_text(encoding="utf-8")
        _check_schema(file, text)
        return Manifest.model_validate_json(text)
    except (ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error


def _check_schema(file: Path, text: str) -> None:
    class Version(BaseModel):
        schema_version: int

    found = Version.model_validate_json(text).schema_version
    if found != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} was written by another version of flabc.",
            expected=f"schema_version {SCHEMA_VERSION}",
            found=str(found),
            fix="Make the folder again with this version.",
        )


def _verify(path: Path, name: str, digest: str) -> None:
    file = path / name
    if not file.resolve().is_relative_to(path.resolve()):
        raise ArtifactError(f"{path / MANIFEST} names a file outside the folder: {name!r}.")
    if not file.is_file():
        raise ArtifactError(f"{path} is incomplete: {name} is missing.", fix="Make the folder again.")
    found = sha256(file)
    if found != digest:
        raise ArtifactError(
            f"{path} is damaged: {name} is not the file that was written.",
            expected=f"sha256 {digest[:16]}…",
            found=f"{found[:16]}…",
            fix="Make the folder again.",
        )


def _sibling(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.tmp")


def _sweep(out: Path) -> None:
    """Remove what killed writers of the same folder left: their siblings whose process is gone."""
    for leftover in out.parent.glob(f".{out.name}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid == str(os.getpid()) or (pid.isdigit() and not _is_running(int(pid))):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _put_in_place(new: Path, out: Path) -> None:
    """Rename ``new`` to ``out``; a folder already there changes places with it in one step where the system can."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        new.replace(out)
    elif not _exchange(new, out):
        old = out.with_name(f".{out.name}.old.{os.getpid()}.tmp")
        out.rename(old)
        new.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically with Linux' ``renameat2(RENAME_EXCHANGE)``; False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return rename is not None and rename(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0
