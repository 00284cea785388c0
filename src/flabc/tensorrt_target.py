"""How a model is exported for TensorRT: graph and plan always, rules and CPU first, the engine where there is a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flabc import proof

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions
    from flabc.source import Job

#: The target whose graph TensorRT gets, with a cache of fixed length.
GRAPH_TARGET = "onnx-standard"


def precisions() -> list[str]:
    """What can be exported and TensorRT computes in, the default first."""
    from flabc.export import engine, tensorrt_plan

    known = engine.PRECISIONS[GRAPH_TARGET]
    return [name for name in tensorrt_plan.PRECISIONS if name in known]


def make(job: Job, options: BuildOptions | None) -> dict[str, Any]:
    """Write and prove what TensorRT builds, and build it if this machine can.

    Args:
        job: what is exported.
        options: how TensorRT builds; None for the defaults.

    Returns:
        the receipt: of the built engine if it was built, else of the ONNX file; what was done is under ``tensorrt``.

    Raises:
        ModelError: if the graph breaks a rule of TensorRT's, or the model is too short.
        ParityError: if the ONNX file or the built engine does not say what torch says.
        EngineError: if TensorRT cannot build.
    """
    from flabc.export import engine, parity, tensorrt_engine, tensorrt_plan, tensorrt_rules
    from flabc.export.precision import precision_named

    stored, least = precision_named(job.precision, job.storage), parity.LONGEST
    plan = tensorrt_plan.plan(
        job.source.spec, job.precision, options or tensorrt_plan.BuildOptions(), least_length=least
    )
    engine.write(job.source.folder, job.source.spec, job.out, GRAPH_TARGET, stored, cache_length=plan.max_length)
    for planned in plan.engines:
        tensorrt_rules.check(job.out / planned.graph)
    plan.write(job.out)
    receipt = proof.graph(job.out, job.source, GRAPH_TARGET, stored)
    missing = tensorrt_engine.missing()
    if missing is not None:
        return receipt | {"tensorrt": {"built": False, "missing": f"{missing}. {tensorrt_engine.HOW}"}}
    tensorrt_engine.build(job.out, plan)
    built = proof.engine(job.out, job.source, "tensorrt", stored, plan.options.max_batch)
    return built | {"tensorrt": {"built": True, "graph": receipt}}
