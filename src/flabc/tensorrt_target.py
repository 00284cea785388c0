"""How a model is exported for TensorRT: graph and plan always, rules and CPU first, the engine where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc.errors import EngineError
from flabc.spec import ModelSpec

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions, BuildPlan

#: Compares a draft with torch: see ``flabc.targets``.
Prove = Callable[..., dict[str, Any]]

#: The target whose graph TensorRT gets, with a cache of fixed length.
GRAPH_TARGET = "onnx-standard"


def precisions() -> list[str]:
    """What can be exported and TensorRT computes in, the default first."""
    from flabc.export import engine, tensorrt_plan

    known = engine.PRECISIONS[GRAPH_TARGET]
    return [name for name in tensorrt_plan.PRECISIONS if name in known]


def make(
    folder: Path, spec: ModelSpec, out: Path, precision: str, options: BuildOptions | None, prove: Prove
) -> dict[str, Any]:
    """Write and prove what TensorRT builds, and build it if this machine can.

    Args:
        folder: the checkpoint.
        spec: its shapes.
        out: the draft's folder.
        precision: one of ``precisions()``.
        options: how TensorRT builds; None for the defaults.
        prove: compares a draft with torch.

    Returns:
        the receipt: of the built engine if it was built, else of the ONNX file; what was done is under ``tensorrt``.

    Raises:
        ModelError: if the graph breaks a rule of TensorRT's, or the model is too short.
        ParityError: if the ONNX file or the built engine does not say what torch says.
        EngineError: if TensorRT cannot build.
    """
    from flabc.export import engine, parity, tensorrt_engine, tensorrt_plan, tensorrt_rules

    least = max(parity.LENGTHS) + parity.STEPS
    plan = tensorrt_plan.plan(spec, precision, options or tensorrt_plan.BuildOptions(), least_length=least)
    engine.write(folder, spec, out, GRAPH_TARGET, precision, cache_length=plan.max_length)
    for built in plan.engines:
        tensorrt_rules.check(out / built.graph)
    plan.write(out)
    receipt = _on_cpu(out, folder, spec, precision, prove)
    missing = tensorrt_engine.missing()
    if missing is not None:
        return {**receipt, "tensorrt": {"built": False, "missing": f"{missing}. {tensorrt_engine.HOW}"}}
    return {**_built(out, folder, spec, plan, prove), "tensorrt": {"built": True, "graph": receipt}}


def _on_cpu(out: Path, folder: Path, spec: ModelSpec, precision: str, prove: Prove) -> dict[str, Any]:
    """The receipt of the ONNX file in ONNX Runtime; says so if that cannot run the precision."""
    from flabc.runtime.backend import RUNS, Limits, open_backend

    try:
        open_backend(RUNS[GRAPH_TARGET], out, spec, Limits(max_length=1))
    except EngineError as error:
        return {"proven": False, "why": f"ONNX Runtime does not run {precision} here: {error}"}
    return prove(out, folder, spec, GRAPH_TARGET, precision)


def _built(out: Path, folder: Path, spec: ModelSpec, plan: BuildPlan, prove: Prove) -> dict[str, Any]:
    """Build the engines; token for token the same must come out of them."""
    from flabc.export import tensorrt_engine

    tensorrt_engine.build(out, plan)
    return prove(out, folder, spec, "tensorrt", plan.precision, max_batch=plan.options.max_batch)
