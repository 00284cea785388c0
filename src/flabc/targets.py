"""What a model can be exported to: how each target is written, and how it is proven against torch.

Here the parts meet: what ``export`` writes, a backend of ``runtime`` runs, and torch says what is right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc.artifact import Artifact, Kind, Manifest
from flabc.console import note
from flabc.errors import ModelError, ParityError, UnknownNameError, UsageError, require
from flabc.export.precision import Precision, Storage, precision_named
from flabc.spec import ModelSpec

if TYPE_CHECKING:
    from flabc.export.parity import Parity
    from flabc.export.tensorrt_plan import BuildOptions
    from flabc.runtime.text import TextCodec


@dataclass(frozen=True)
class Job:
    """What is to be exported.

    Args:
        checkpoint: a Hugging Face folder.
        spec: its shapes.
        out: the folder to write into.
        precision: by name.
        storage: what is changed about it, if anything.
        name: the model's.
    """

    checkpoint: Path
    spec: ModelSpec
    out: Path
    precision: str
    storage: Storage | None
    name: str


#: Writes and proves; gives the receipt.
Make = Callable[[Job], dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """What can be exported to.

    Args:
        kind: of the folder that is made.
        precision: the precision that is meant by a name, or by None.
        make: writes and proves it.
    """

    kind: Kind
    precision: Callable[[str | None], str]
    make: Make


@contextmanager
def model_folder(model: str, *, tie: bool = False) -> Iterator[tuple[Path, ModelSpec, Manifest | None]]:
    """A folder that backends and export can open, its spec, and its manifest if it is an artifact.

    A GGUF becomes such a folder for as long as it is needed.
    """
    path = Path(model)
    if Artifact.is_at(path):
        opened = Artifact.open(path)
        yield path, opened.model, opened.manifest
        return
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress import checkpoint, load
    from flabc.compress.location import locate

    location = locate(model)
    if location.file is None and not tie:
        yield location.folder, ModelSpec.from_config(load.read_config(location)), None
        return
    with tempfile.TemporaryDirectory(prefix="flabc-") as folder:
        loaded = load.load(model, tie=tie)
        checkpoint.write(loaded, Path(folder))
        spec = loaded.spec
        del loaded  # whoever opens the folder needs the memory
        yield Path(folder), spec, None


def _onnx(target: str) -> Target:
    def precision(name: str | None) -> str:
        require("onnx_ir", "export")
        from flabc.export import engine

        return _choice(name, engine.PRECISIONS[target])

    def make(job: Job) -> dict[str, Any]:
        from flabc.export import engine

        stored = precision_named(job.precision, job.storage)
        engine.write(job.checkpoint, job.spec, job.out, target, stored)
        return _prove_graph(job, target, stored) | {"stored": asdict(stored)}

    return Target("engine", precision, make)


def _gguf_precision(precision: str | None) -> str:
    require("gguf", "compress")
    from flabc.export import gguf_writer

    return _choice(precision, gguf_writer.PRECISIONS)


def _choice(precision: str | None, known: Iterable[str]) -> str:
    """A precision that the target has, its first by default."""
    chosen = precision or next(iter(known))
    if chosen not in known:
        raise UnknownNameError("precision", chosen, known)
    return chosen


def _make_gguf(job: Job) -> dict[str, Any]:
    from flabc.compress.load import complete_config
    from flabc.export import gguf_writer

    if job.storage not in (None, Storage()):
        raise UsageError("How a GGUF stores its matrices is settled by its precision.", fix="Leave the options away.")
    folder, spec = job.checkpoint, job.spec
    gguf_writer.check_layers(spec)
    config = complete_config(folder)
    gguf_writer.check(spec, config)
    file = job.out / gguf_writer.FILE
    stored = gguf_writer.write(folder, spec, config, file, precision=job.precision, name=job.name)
    length = gguf_writer.context_length(spec, config)
    return _prove_gguf(file, folder, spec, job.precision, length) | {"stored": stored}


def _tensorrt(options: BuildOptions | None = None) -> Target:
    def precision(name: str | None) -> str:
        require("onnx_ir", "export")
        from flabc import tensorrt_target

        return _choice(name, tensorrt_target.precisions())

    def make(job: Job) -> dict[str, Any]:
        from flabc import tensorrt_target

        return tensorrt_target.make(job, options, prove_graph=_prove_graph, prove_engine=_prove)

    return Target("engine", precision, make)


TARGETS = {
    "onnx": _onnx("onnx"),
    "onnx-standard": _onnx("onnx-standard"),
    "tensorrt": _tensorrt(),
    "gguf": Target("gguf", _gguf_precision, _make_gguf),
}


def target_named(name: str, options: BuildOptions | None = None) -> Target:
    """The target of that name.

    Args:
        name: a key of ``TARGETS``.
        options: for ``tensorrt`` alone, how it is built.

    Raises:
        UnknownNameError: if there is none.
        UsageError: if there are options that it does not have.
    """
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    if options is None:
        return TARGETS[name]
    if name != "tensorrt":
        flags = ", ".join(f"--{field.replace('_', '-')}" for field in sorted(options.model_fields_set))
        raise UsageError(f"{flags} is for TensorRT.", expected="--target tensorrt", found=f"--target {name}")
    return _tensorrt(options)


def _prove_graph(job: Job, target: str, stored: Precision) -> dict[str, Any]:
    """Compare a draft's graph in ONNX Runtime with torch, in the way that its precision can be run."""
    return (_prove_twin if stored.compute == "bf16" else _prove)(job, target, stored)


def _prove(job: Job, target: str, stored: Precision, max_batch: int | None = None) -> dict[str, Any]:
    """Compare an engine that is still a draft with torch on the checkpoint it was made from."""
    return _compare(job.out, job, target, stored, max_batch)


def _prove_twin(job: Job, target: str, stored: Precision) -> dict[str, Any]:
    """The same for an engine in bfloat16, which ONNX Runtime cannot compute in on a CPU: its float32 twin is run."""
    from flabc.export import twin

    note("bf16 has no kernels on a CPU: the proof runs this graph and its stored weights in float32")
    with tempfile.TemporaryDirectory(prefix="flabc-") as folder:
        twin.write(job.out, Path(folder))
        return _compare(Path(folder), job, target, stored) | {"computed_in": "fp32"}


def _compare(engine: Path, job: Job, target: str, stored: Precision, max_batch: int | None = None) -> dict[str, Any]:
    """The receipt of an engine that holds ``max_batch`` sequences, or as many as are asked for."""
    require("torch", "compress")
    from flabc.export import parity
    from flabc.runtime.backend import RUNS, Limits, open_backend
    from flabc.runtime.text import TextCodec

    length = parity.LONGEST
    if job.spec.max_position_embeddings < length:
        raise ModelError(
            "The model has too few positions to be checked against torch.",
            expected=f"at least {length}",
            found=str(job.spec.max_position_embeddings),
        )
    limits = Limits(max_batch=min(len(parity.LENGTHS), max_batch or len(parity.LENGTHS)), max_length=length)
    ids = TextCodec(job.checkpoint).encode_plain(parity.text())
    reference = open_backend("torch", job.checkpoint, job.spec, limits)
    turns = parity.listen(reference, ids, max_batch=limits.max_batch)
    del reference  # the engine needs its memory
    candidate = open_backend(RUNS[target], engine, job.spec, limits)
    return parity.check(candidate, turns, precision=stored.coarsest).receipt()


def _prove_gguf(file: Path, folder: Path, spec: ModelSpec, precision: str, length: int) -> dict[str, Any]:
    """Load a GGUF that is still a draft back with transformers, and compare it with its checkpoint in torch.

    The bound of float32 holds between the file and the checkpoint with its matrices rounded as the file has them, so
    that rounding hides no fault; what rounding itself costs is measured and bounded beside it.

    Raises:
        ParityError: if one of the bounds does not hold, or the tokenizers give other ids.
    """
    from flabc.export import gguf_writer, parity
    from flabc.runtime.backend import Limits
    from flabc.runtime.backends.reference import TorchBackend
    from flabc.runtime.text import TextCodec

    codec, limits = TextCodec(folder), Limits(max_length=length)
    ids = codec.encode_plain(parity.text())
    rounding: dict[str, Any] = {}
    reference = TorchBackend(folder, spec, limits)
    turns = parity.listen(reference, ids, max_batch=1, max_length=length)
    if precision != "fp32":
        reference.change_matrices(lambda matrix: gguf_writer.rounded(matrix, precision))
        cost = parity.compare(reference, turns, tolerance=gguf_writer.ROUNDING[precision])
        rounding = {"rounding": cost.receipt()}
        _hold(
            cost.max_relative <= gguf_writer.ROUNDING[precision],
            f"Rounding to {precision} changes the model too much.",
            cost,
        )
        turns = parity.listen(reference, ids, max_batch=1, max_length=length)
    del reference
    with model_folder(str(file)) as (back, found, _):
        _same_tokens(codec, TextCodec(back), (parity.text(), parity.ODD_TEXT))
        proof = parity.compare(TorchBackend(back, found, limits), turns)
        _hold(proof.holds, "The file does not say what the checkpoint says.", proof)
    return proof.receipt() | rounding


def _hold(holds: bool, problem: str, parity: Parity) -> None:
    if not holds:
        raise ParityError(
            problem,
            expected=f"logits within {parity.tolerance:g} of torch's",
            found=f"a difference of {parity.max_relative:.3g}, {parity.greedy_mismatches} other tokens",
            fix="No folder was written.",
        )


def _same_tokens(ours: TextCodec, theirs: TextCodec, texts: Sequence[str]) -> None:
    """Make sure that two tokenizers do the same with texts.

    Raises:
        ParityError: at the first that they encode differently.
    """
    for text in texts:
        expected, found = ours.encode(text), theirs.encode(text)
        if expected != found:
            at = next((n for n, pair in enumerate(zip(expected, found, strict=False)) if pair[0] != pair[1]), 0)
            raise ParityError(
                "The tokenizer that transformers reads from the file gives other ids.",
                expected=f"{expected[at : at + 5]} at {at}",
                found=str(found[at : at + 5]),
                fix="No folder was written.",
            )
