"""Builds the engines of a plan with TensorRT, through polygraphy. Needs a GPU; untested without one.

NVIDIA, TensorRT documentation: "Working with Dynamic Shapes", "Optimizing Builder Performance" (timing cache),
``IProgressMonitor``. Polygraphy, API reference: ``backend.trt``.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

from flabc.console import Advance, progress
from flabc.errors import EngineError, require

from .tensorrt_plan import SCRIPT, BuildPlan, EnginePlan

#: What building needs, by the name of the module.
NEEDED = ("tensorrt", "polygraphy", "cuda.bindings")

HOW = (
    f"On a machine with an NVIDIA GPU and pip install 'flabc[tensorrt]' run the same command again, which also proves "
    f"the engine; or run {SCRIPT} there, which does not."
)


def missing() -> str | None:
    """Why no engine can be built on this machine, in words; None if it can be tried."""
    absent = [name for name in NEEDED if not _is_installed(name)]
    if absent:
        return f"no {', '.join(absent)} installed"
    cuda = require("cuda.bindings.runtime", "tensorrt")
    error, count = cuda.cudaGetDeviceCount()
    if error != cuda.cudaError_t.cudaSuccess:
        return f"no GPU: {cuda.cudaGetErrorString(error)[1].decode()}"
    return None if count else "no GPU"


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not there either
        return False


def build(folder: Path, plan: BuildPlan) -> None:
    """Build every engine of a plan into its folder.

    Raises:
        MissingExtraError: if TensorRT or polygraphy is not installed.
        EngineError: if TensorRT refuses the graph, or the build fails.
    """
    exception = require("polygraphy.exception", "tensorrt").PolygraphyException
    for engine in plan.engines:
        phases = Phases(engine.engine)
        try:
            with redirect_stdout(sys.stderr):  # where polygraphy's notes would get between the data
                built = _build(folder, plan, engine, phases)
        except exception as error:
            raise EngineError(
                f"TensorRT cannot build {engine.engine}: {error}",
                fix="No folder was written. Its own messages are above.",
            ) from error
        finally:
            phases.close()
        (folder / engine.engine).write_bytes(built)


def _build(folder: Path, plan: BuildPlan, engine: EnginePlan, phases: Phases) -> memoryview:
    """One engine, serialised."""
    tensorrt = require("tensorrt", "tensorrt")
    backend = require("polygraphy.backend.trt", "tensorrt")
    network = backend.network_from_onnx_path(str(folder / engine.graph), strongly_typed=plan.strongly_typed)
    # Without this a build fails where no fused kernel fits the mask, the type and the size of heads.
    network = backend.set_decomposable_attentions(network)
    config = backend.CreateConfig(
        profiles=profiles(engine), progress_monitor=_monitor(tensorrt, phases), **config_arguments(plan, tensorrt)
    )
    return memoryview(
        backend.engine_bytes_from_network(network, config=config, save_timing_cache=plan.options.timing_cache)
    )


def config_arguments(plan: BuildPlan, tensorrt: Any) -> dict[str, Any]:
    """The arguments of polygraphy's ``CreateConfig`` that a plan asks for."""
    options = plan.options
    level = tensorrt.HardwareCompatibilityLevel
    return {
        "load_timing_cache": options.timing_cache,
        "version_compatible": options.version_compatible,
        "hardware_compatibility_level": level.AMPERE_PLUS if options.hardware_compatible else None,
        "strip_plan": options.strip_weights,
    }


def profiles(engine: EnginePlan) -> list[Any]:
    """An engine's optimisation profiles, as polygraphy has them."""
    made = []
    for profile in engine.profiles:
        made.append(require("polygraphy.backend.trt", "tensorrt").Profile())
        for name, shapes in profile.shapes.items():
            made[-1].add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
    return made


class Phases:
    """A bar for each outermost phase of a build. TensorRT reports from several threads.

    Args:
        what: is built.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._open: dict[str, tuple[ExitStack, Advance]] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside ``parent`` if there is one."""
        with self._lock:
            if parent is None and phase not in self._open:
                stack = ExitStack()
                advance = stack.enter_context(progress(f"{self._what}: {phase}", steps))
                self._open[phase] = (stack, advance)

    def step(self, phase: str) -> None:
        """One of its steps is done."""
        with self._lock:
            if phase in self._open:
                self._open[phase][1](1)

    def finish(self, phase: str) -> None:
        """It has ended, perhaps with steps left out."""
        with self._lock:
            if phase in self._open:
                self._open.pop(phase)[0].close()

    def close(self) -> None:
        """Take away what bars a failed build left."""
        for phase in list(self._open):
            self.finish(phase)


def _monitor(tensorrt: Any, phases: Phases) -> Any:
    """TensorRT's progress monitor, reporting to ``phases``; its base class exists only where TensorRT is installed."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name)
            return True

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
