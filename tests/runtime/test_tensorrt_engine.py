"""The TensorRT backend over a stand-in: TensorRT's calls, answered by ONNX Runtime on the same graph in host memory.

What it shows: shapes within the profiles, addresses, what is written where, and that the right numbers come out. What
it cannot show is TensorRT itself; ``test_the_engine_of_this_machine`` does, where there is a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from flabc import api
from flabc.errors import EngineError, MissingExtraError
from flabc.export import engine, tensorrt_engine, tensorrt_plan
from flabc.export.precision import precision_named
from flabc.export.tensorrt_plan import BuildOptions, BuildPlan
from flabc.runtime.backend import Limits, open_backend
from flabc.runtime.backends.device_memory import CudaMemory
from flabc.runtime.backends.tensorrt_engine import ALIGNMENT, TYPES, TensorRtBackend, _in_float32
from flabc.runtime.session import Session
from flabc.spec import ModelSpec

from ..export.conftest import made_uneven
from .conftest import HostMemory

#: Why this machine builds no engine.
MISSING = tensorrt_engine.missing()

MAX_BATCH, MAX_INPUT, PLACES = 3, 16, 64

NAMES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}


class StandIn:
    """An ``ICudaEngine`` of a graph with the profiles of a plan."""

    def __init__(self, file: Path, profiles: Any, memory: HostMemory) -> None:
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.profiles, self.memory = profiles, memory
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.outputs = {given.name: given for given in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)

    def get_tensor_name(self, at: int) -> str:
        return self.names[at]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in self.inputs else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=NAMES[(self.inputs | self.outputs)[name].type])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        shapes = self.profiles[profile].shapes[name]
        return [shapes.min, shapes.opt, shapes.max]

    def create_execution_context(self) -> StandInContext:
        return StandInContext(self)


class StandInContext:
    """An ``IExecutionContext``: refuses what TensorRT's documents say it refuses."""

    def __init__(self, engine: StandIn) -> None:
        self.engine = engine
        self.profile = -1
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == HostMemory.stream

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, self.profile)
        self.shapes[name] = tuple(shape)
        return len(shape) == len(most) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.names and address % ALIGNMENT == 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """Every dimension with a name has the size that an input gives it."""
        sizes: dict[Any, int] = {}
        for given, value in self.engine.inputs.items():
            sizes |= dict(zip(value.shape, self.shapes[given], strict=True))
        shape = (self.engine.inputs | self.engine.outputs)[name].shape
        return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

    def view(self, name: str) -> Any:
        """The array at a binding's address."""
        shape, kind = self.get_tensor_shape(name), TYPES[self.engine.get_tensor_dtype(name).name]
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        self.engine.memory.check(self.addresses[name], size)
        return np.frombuffer((ctypes.c_char * size).from_address(self.addresses[name]), kind).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        if stream != HostMemory.stream or set(self.addresses) != set(self.engine.names):
            return False
        if set(self.shapes) != set(self.engine.inputs):
            return False
        pasts = [name for name in self.engine.inputs if name.startswith("past_key_values.")]
        if any(self.addresses[name] != self.addresses[name.replace("past_key_values", "present")] for name in pasts):
            return False  # a cache is written where it lies
        found = self.engine.session.run(None, {name: self.view(name).copy() for name in self.engine.inputs})
        for name, array in zip(self.engine.outputs, found, strict=True):
            self.view(name)[...] = array
        self.addresses, self.shapes = {}, {}  # so that every run must bind all of it
        return True


class StandIns:
    """Opens stand-ins in place of built engines."""

    def __init__(self, folder: Path, plan: BuildPlan, memory: HostMemory) -> None:
        self.folder, self.plan, self.memory = folder, plan, memory

    def load(self, name: str, graph: str) -> StandIn:
        built = next(each for each in self.plan.engines if (each.engine, each.graph) == (name, graph))
        return StandIn(self.folder / graph, built.profiles, self.memory)


@pytest.fixture(scope="module")
def exported(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, ModelSpec, BuildPlan]:
    """A tiny model with uneven layers, its graphs and the plan of their engines."""
    from flabc.compress import checkpoint, load

    folder, out = tmp_path_factory.mktemp("uneven"), tmp_path_factory.mktemp("for-tensorrt")
    model = made_uneven(load.load(str(tiny("qwen2-tied"))))
    checkpoint.write(model, folder)
    options = BuildOptions(max_batch=MAX_BATCH, max_input=MAX_INPUT, max_length=PLACES)
    plan = tensorrt_plan.plan(model.spec, "fp32", options)
    engine.write(folder, model.spec, out, "onnx-standard", cache_length=PLACES)
    return folder, out, model.spec, plan


@pytest.fixture
def opened(exported: tuple[Path, Path, ModelSpec, BuildPlan]) -> Callable[..., TensorRtBackend]:
    _, out, spec, plan = exported

    def make(**limits: Any) -> TensorRtBackend:
        memory = HostMemory()
        return TensorRtBackend(spec, Limits(**limits), memory, StandIns(out, plan, memory))

    return make


@pytest.fixture(scope="module")
def torch_backend(exported: tuple[Path, Path, ModelSpec, BuildPlan]) -> Any:
    folder, _, spec, _ = exported
    return open_backend("torch", folder, spec, Limits(max_batch=MAX_BATCH, max_length=PLACES))


IDS = np.random.default_rng(3).integers(3, 600, (3, 60))


def test_what_the_plan_names_is_what_the_graphs_ask_for(exported: tuple[Path, Path, ModelSpec, BuildPlan]) -> None:
    _, out, _, plan = exported
    for built in plan.engines:
        session = onnxruntime.InferenceSession(str(out / built.graph), providers=["CPUExecutionProvider"])
        shapes = {given.name: given.shape for given in session.get_inputs()}
        for profile in built.profiles:
            assert set(profile.shapes) == set(shapes)
            for name, sizes in profile.shapes.items():
                fixed = {at: size for at, size in enumerate(shapes[name]) if isinstance(size, int)}
                assert all(sizes.min[at] == sizes.opt[at] == sizes.max[at] == size for at, size in fixed.items())


def test_ragged_prompts_steps_and_who_joins_and_leaves(opened: Any, torch_backend: Any) -> None:
    """Each step says what torch says."""
    backend = opened(max_batch=3)
    for each in (backend, torch_backend):
        each.start(2)
    one, two = np.array([1]), np.array([1, 1])
    steps = [
        lambda b: b.extend(IDS[:2, :9], np.array([4, 9])),
        lambda b: b.extend(IDS[:2, 9:10], two),
        lambda b: b.join(IDS[2:, :13], np.array([13])),
        lambda b: b.extend(IDS[:, 14:15], np.array([1, 1, 1])),
        lambda b: b.keep([2, 0]) or b.extend(IDS[:2, 20:21], two),  # they change places
        lambda b: b.keep([1]) or b.extend(IDS[:1, 21:22], one),
    ]
    for at, step in enumerate(steps):
        np.testing.assert_allclose(step(backend), step(torch_backend), atol=2e-4, err_msg=f"step {at}")


def test_a_prompt_longer_than_the_profile_goes_in_pieces(opened: Any, torch_backend: Any) -> None:
    counts = np.array([41, 3, 17])
    backend = opened(max_batch=3)
    for each in (backend, torch_backend):
        each.start(3)
    assert max(counts) > MAX_INPUT
    found, expected = (each.extend(IDS[:, :41], counts) for each in (backend, torch_backend))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    found, expected = (each.extend(IDS[:, 41:42], np.ones(3, np.int64)) for each in (backend, torch_backend))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_cache_is_filled_to_its_last_place(opened: Any, torch_backend: Any) -> None:
    """Padding that would be written behind the end of the cache is left out."""
    backend = opened(max_batch=2)
    for each in (backend, torch_backend):
        each.start(2)
        each.extend(IDS[:2, :58], np.array([58, 2]))
    found, expected = (each.extend(IDS[:2, :8], np.array([6, 8])) for each in (backend, torch_backend))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    with pytest.raises(EngineError, match="65 tokens"):
        backend.extend(IDS[:2, :1], np.array([1, 1]))


def test_every_position_is_scored_and_the_running_sequences_go_on(opened: Any, torch_backend: Any) -> None:
    backend = opened(max_batch=1)
    for each in (backend, torch_backend):
        each.start(1)
        each.extend(IDS[:1, :5], np.array([5]))
    np.testing.assert_allclose(backend.score(IDS[:, :40]), torch_backend.score(IDS[:, :40]), atol=2e-4)
    found, expected = (each.extend(IDS[:1, 5:6], np.array([1])) for each in (backend, torch_backend))
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_beginnings_are_saved_and_restored(opened: Any, torch_backend: Any) -> None:
    backend = opened(max_batch=2)
    backend.start(1)
    backend.extend(IDS[:1, :20], np.array([20]))
    backend.restore(backend.save(0, 18), 15)
    branch = np.concatenate([IDS[0, :15], [9, 8, 7]])
    found = backend.extend(branch[None, 15:], np.array([3]), first=1)
    torch_backend.start(1)
    np.testing.assert_allclose(found, torch_backend.extend(branch[None], np.array([18])), atol=2e-4)
    both = backend.extend(np.array([[5], [6]]), np.array([1, 1]))
    expected = torch_backend.extend(np.array([[6]]), np.array([1]))
    np.testing.assert_allclose(both[1:], expected, atol=2e-4)


def test_a_cache_in_half_precision(exported: tuple[Path, Path, ModelSpec, BuildPlan], tmp_path: Path) -> None:
    """The same graph in ONNX Runtime's own backend says the same to the bit."""
    folder, _, spec, plan = exported
    engine.write(folder, spec, tmp_path, "onnx-standard", precision_named("fp16"), cache_length=PLACES)
    memory = HostMemory()
    limits = Limits(max_batch=3, max_length=PLACES)
    backends = (
        TensorRtBackend(spec, limits, memory, StandIns(tmp_path, plan, memory)),
        open_backend("onnxruntime-static", tmp_path, spec, limits),
    )
    said = []
    for backend in backends:
        backend.start(2)
        backend.extend(IDS[:2, :9], np.array([4, 9]))
        backend.join(IDS[2:, :13], np.array([13]))
        backend.keep([2, 0])
        said.append((backend.extend(IDS[:2, 20:21], np.array([1, 1])), backend.score(IDS[:1, :20])))
    for found, expected in zip(*said, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_no_more_than_was_built_for(opened: Any) -> None:
    with pytest.raises(EngineError, match=r"at most 3, for which the engine was built"):
        opened(max_batch=4)
    assert opened(max_length=2048).limits.max_length == PLACES
    with pytest.raises(EngineError, match="65 tokens"):
        opened().score(np.tile(IDS, (1, 2))[:1, :65])


def test_memory_is_kept_from_run_to_run(opened: Any) -> None:
    backend = opened(max_batch=1)
    backend.start(1)
    for at in (0, 10):
        backend.extend(IDS[:1, at : at + 10], np.array([10]))
    held = len(backend._memory.blocks)
    for at in range(20, 40):
        backend.extend(IDS[:1, at : at + 1], np.array([1]))
    assert len(backend._memory.blocks) == held


def test_the_bits_of_bfloat16_are_read_as_torch_reads_them() -> None:
    import torch

    numbers = torch.randn(64).to(torch.bfloat16)
    np.testing.assert_array_equal(_in_float32(numbers.view(torch.uint16).numpy()), numbers.float().numpy())


def test_a_folder_without_an_engine_says_what_is_missing(exported: tuple[Path, Path, ModelSpec, BuildPlan]) -> None:
    _, out, spec, _ = exported
    with pytest.raises(EngineError, match=r"model\.plan has not been built.*--target tensorrt"):
        open_backend("tensorrt", out, spec, Limits())


def test_a_machine_without_a_gpu_is_told_so() -> None:
    if importlib.util.find_spec("cuda") is None:
        with pytest.raises(MissingExtraError, match=r"flabc\[tensorrt\]"):
            CudaMemory("tensorrt")
    elif MISSING is not None:
        with pytest.raises(EngineError, match="CUDA says"):
            CudaMemory("tensorrt")


@pytest.mark.tensorrt
@pytest.mark.skipif(MISSING is not None, reason=f"TensorRT cannot build here: {MISSING}")
def test_the_engine_of_this_machine(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Built, proven against torch token for token, opened, and asked for an answer."""
    cache = tmp_path / "timings"
    for name, options in {
        "plain": BuildOptions(max_batch=4, max_input=64, timing_cache=str(cache)),
        "stripped": BuildOptions(max_batch=2, strip_weights=True, timing_cache=str(cache)),
        "portable": BuildOptions(max_batch=1, version_compatible=True, hardware_compatible=True),
    }.items():
        done = api.export(tiny_checkpoint, tmp_path / name, target="tensorrt", build=options)
        assert done.missing is None
        assert done.parity["tensorrt"]["built"]
        assert done.parity["holds"]
        assert Session.open(tmp_path / name).generate("def f(x):").token_ids
    assert cache.stat().st_size
