"""What a model can be exported to: how each target is written and proven."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flabc import proof
from flabc.artifact import Kind
from flabc.errors import UnknownNameError, UsageError, require
from flabc.export.precision import Storage, precision_named
from flabc.source import Job

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions


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


def _onnx(target: str) -> Target:
    def precision(name: str | None) -> str:
        require("onnx_ir", "export")
        from flabc.export import engine

        return _choice(name, engine.PRECISIONS[target])

    def make(job: Job) -> dict[str, Any]:
        from flabc.export import engine

        stored = precision_named(job.precision, job.storage, target)
        engine.write(job.source.folder, job.source.spec, job.out, target, stored)
        return proof.graph(job.out, job.source, target, stored)

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
    folder, spec = job.source.folder, job.source.spec
    gguf_writer.check_layers(spec)
    config = complete_config(folder)
    gguf_writer.check(spec, config)
    file = job.out / gguf_writer.FILE
    stored = gguf_writer.write(folder, spec, config, file, precision=job.precision, name=job.source.name)
    length = gguf_writer.context_length(spec, config)
    return proof.gguf(file, job.source, job.precision, length) | {"stored": stored}


def _tensorrt(options: BuildOptions | None = None) -> Target:
    def precision(name: str | None) -> str:
        require("onnx_ir", "export")
        from flabc import tensorrt_target

        return _choice(name, tensorrt_target.precisions())

    def make(job: Job) -> dict[str, Any]:
        from flabc import tensorrt_target

        return tensorrt_target.make(job, options)

    return Target("engine", precision, make)


TARGETS = {
    "onnx": _onnx("onnx"),
    "onnx-standard": _onnx("onnx-standard"),
    "openvino": _onnx("openvino"),
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
