"""Sources: models as folders, what torch says of them, and what is to be made of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from flabc.artifact import MANIFEST, Artifact, Manifest, SourceRecord, sha256
from flabc.errors import ModelError, require
from flabc.export.precision import Storage
from flabc.spec import ModelSpec

if TYPE_CHECKING:
    from flabc.compress.location import Location
    from flabc.export.parity import Turn


@dataclass(frozen=True)
class Source:
    """A model that is opened or exported.

    Args:
        folder: a Hugging Face folder.
        spec: its shapes.
        name: the model's.
        manifest: if it is an artifact.
        location: where it was found, if it is none.
    """

    folder: Path
    spec: ModelSpec
    name: str
    manifest: Manifest | None = None
    location: Location | None = None
    _heard: dict[int, Sequence[Turn]] = field(default_factory=dict)

    @cached_property
    def record(self) -> SourceRecord | None:
        """What it was read from, for what is made of it: every file of weights is hashed."""
        from flabc.compress.load import source_hashes

        if self.location is None:
            return None
        return SourceRecord(name=self.location.name, files=source_hashes(self.location))

    def identity(self) -> str:
        """What tells it from other models, without reading its weights."""
        if self.manifest is not None:
            return sha256(self.folder / MANIFEST)
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        return "\n".join([self.name, *(f"{file.name} {file.stat().st_size}" for file in files)])

    def turns(self, max_batch: int) -> Sequence[Turn]:
        """What torch says, for engines to be compared with; it is asked once, however many are made of one model.

        Args:
            max_batch: sequences that the engines hold at once.

        Raises:
            ModelError: if the model has too few positions.
        """
        if max_batch not in self._heard:
            self._heard[max_batch] = self._listen(max_batch)
        return self._heard[max_batch]

    def _listen(self, max_batch: int) -> Sequence[Turn]:
        require("torch", "compress")
        from flabc.export import parity
        from flabc.runtime.backend import Limits, open_backend
        from flabc.runtime.text import TextCodec

        if self.spec.max_position_embeddings < parity.LONGEST:
            raise ModelError(
                "The model has too few positions to be checked against torch.",
                expected=f"at least {parity.LONGEST}",
                found=str(self.spec.max_position_embeddings),
            )
        ids = TextCodec(self.folder).encode_plain(parity.text())
        reference = open_backend("torch", self.folder, self.spec, Limits(max_batch, parity.LONGEST))
        return parity.listen(reference, ids, max_batch=max_batch)


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Args:
        source: the model.
        out: the folder to write into.
        precision: by name.
        storage: what is changed about it, if anything.
    """

    source: Source
    out: Path
    precision: str
    storage: Storage | None


@contextmanager
def model_folder(model: str, *, tie: bool = False) -> Iterator[Source]:
    """A model as a folder that backends and export can open; a GGUF becomes one for as long as it is needed.

    Args:
        model: a checkpoint, or whatever ``compress`` takes as a model.
        tie: as for ``compress``.
    """
    path = Path(model)
    if Artifact.is_at(path):
        opened = Artifact.open(path)
        yield Source(path, opened.model, path.name, opened.manifest)
        return
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress import checkpoint, load
    from flabc.compress.location import locate

    location = locate(model)
    if location.file is None and not tie:
        yield Source(location.folder, ModelSpec.from_config(load.read_config(location)), path.name, location=location)
        return
    with tempfile.TemporaryDirectory(prefix="flabc-") as folder:
        loaded = load.load(model, tie=tie)
        checkpoint.write(loaded, Path(folder))
        spec = loaded.spec
        del loaded  # whoever opens the folder needs the memory
        yield Source(Path(folder), spec, path.name, location=location)
