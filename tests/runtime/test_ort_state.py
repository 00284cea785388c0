"""ONNX Runtime's cache on a device, over the host's memory: what is said, and what is bound where.

What it shows: addresses, shapes, moved rows, and that each CUDA graph would see the same ones at every run. What it
cannot show is the CUDA provider itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from flabc.artifact import GRAPH
from flabc.errors import EngineError, MissingExtraError
from flabc.runtime.backend import Limits
from flabc.runtime.backends import ort
from flabc.runtime.backends.ort_state import GRAPH_ID, DeviceState, HostState
from flabc.runtime.session import Session

from .conftest import HostMemory

LIMITS = Limits(max_batch=4, max_length=64)


class Watched:
    """A session that notes, by the id of the CUDA graph, what every run had bound where."""

    def __init__(self, session: Any, memory: HostMemory) -> None:
        self.session, self.memory = session, memory
        self.runs: dict[str, list[Any]] = defaultdict(list)

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def io_binding(self) -> WatchedBinding:
        return WatchedBinding(self.session.io_binding(), self.memory)

    def run_with_iobinding(self, binding: WatchedBinding, options: Any) -> None:
        self.runs[options.get_run_config_entry(GRAPH_ID)].append(dict(binding.bound))
        self.session.run_with_iobinding(binding.binding, options)


class WatchedBinding:
    """A binding that notes shape and address; all has to lie in memory that was allocated."""

    def __init__(self, binding: Any, memory: HostMemory) -> None:
        self.binding, self.memory = binding, memory
        self.bound: dict[str, tuple[tuple[int, ...], int]] = {}

    def bind_input(self, *where: Any) -> None:
        self._note(*where)
        self.binding.bind_input(*where)

    def bind_output(self, *where: Any) -> None:
        self._note(*where)
        self.binding.bind_output(*where)

    def _note(self, name: str, device: str, number: int, dtype: Any, shape: list[int], address: int) -> None:
        self.memory.check(address, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        self.bound[name] = tuple(shape), address


@pytest.fixture
def watched(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[ort.OrtBackend, Watched]]:
    """Opens the engine with its cache on a device that is the host."""

    def opened(limits: Limits = LIMITS, *, graphs: bool = True) -> tuple[ort.OrtBackend, Watched]:
        spec, memory = Session.open(tiny_engine).spec, HostMemory()
        session = Watched(ort.open_graph(tiny_engine / GRAPH, limits), memory)
        with monkeypatch.context() as patch:
            patch.setattr(
                ort, "_opened", lambda *_: DeviceState(session, spec, limits, memory, graphs=graphs, device="cpu")
            )
            return ort.OrtBackend(tiny_engine, spec, limits), session

    return opened


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_device_says_what_the_host_says_whatever_joins_leaves_and_comes_back(
    tiny_engine: Path, watched: Callable[..., tuple[ort.OrtBackend, Watched]], seed: int, graphs: bool
) -> None:
    """Prompts alone and ragged, pieces of prompts, steps of all and of some, rows that move, branches."""
    host = ort.OrtBackend(tiny_engine, Session.open(tiny_engine).spec, LIMITS)
    device, session = watched(graphs=graphs)
    draw = np.random.default_rng(seed)
    lengths: list[int] = []

    def ids(rows: int, count: int) -> Any:
        return draw.integers(3, 500, (rows, count))

    def both(call: str, *arguments: Any, **named: Any) -> list[Any]:
        return [getattr(backend, call)(*arguments, **named) for backend in (host, device)]

    both("start", 0)
    for _ in range(24):
        kind = draw.choice(["join", "step", "piece", "keep", "branch"]) if lengths else "join"
        found: list[Any] = []
        if kind == "join" and (room := LIMITS.max_batch - len(lengths)):
            counts = draw.integers(1, 9, draw.integers(1, room + 1))
            found = both("join", ids(len(counts), counts.max()), counts)
            lengths += counts.tolist()
        elif kind == "step" and max(lengths) < LIMITS.max_length:
            first = int(draw.integers(len(lengths)))
            rows = len(lengths) - first
            found = both("extend", ids(rows, 1), np.ones(rows, np.int64), first=first)
            lengths[first:] = [length + 1 for length in lengths[first:]]
        elif kind == "piece" and lengths[-1] + 5 <= LIMITS.max_length:
            found = both("extend", ids(1, 5), np.array([5]), first=len(lengths) - 1)
            lengths[-1] += 5
        elif kind == "keep":
            rows = draw.permutation(len(lengths))[: draw.integers(1, len(lengths) + 1)].tolist()
            both("keep", rows)
            lengths = [lengths[row] for row in rows]
        elif kind == "branch" and len(lengths) < LIMITS.max_batch:
            row = int(draw.integers(len(lengths)))
            length = int(draw.integers(1, lengths[row] + 1))
            for backend in (host, device):
                backend.restore(backend.save(row, length), length)
            lengths.append(length)
        if found:
            np.testing.assert_allclose(*found, atol=2e-5)
    assert ("1" in session.runs) is graphs
    assert "-1" in session.runs


def test_a_graph_sees_one_shape_and_one_address_of_everything(
    watched: Callable[..., tuple[ort.OrtBackend, Watched]],
) -> None:
    backend, session = watched()
    backend.start(0)
    backend.join(np.full((2, 9), 7), np.array([4, 9]))
    for _ in range(3):
        backend.extend(np.full((2, 1), 8), np.array([1, 1]))
    backend.join(np.full((1, 30), 7), np.array([30]))  # more room for prompts than before
    for _ in range(3):
        backend.extend(np.full((3, 1), 8), np.array([1, 1, 1]))
    backend.keep([2, 0])
    for _ in range(3):
        backend.extend(np.full((2, 1), 8), np.array([1, 1]))
    steps = {graph: runs for graph, runs in session.runs.items() if graph != "-1"}
    assert {graph: len(runs) for graph, runs in steps.items()} == {"1": 6, "2": 3}
    for runs in steps.values():
        assert all(run == runs[0] for run in runs)
        assert runs[0]["attention_mask"][0][1] == LIMITS.max_length
    for runs in session.runs.values():  # in place: what is read is what is written
        for run in runs:
            pasts = {name: at for name, at in run.items() if name.startswith("past_key_values.")}
            assert pasts
            assert all(run[name.replace("past_key_values", "present")] == at for name, at in pasts.items())


def test_a_cache_is_filled_to_its_last_place(
    tiny_engine: Path, watched: Callable[..., tuple[ort.OrtBackend, Watched]]
) -> None:
    limits = Limits(max_length=12)
    backend, _ = watched(limits)
    ids = np.random.default_rng(3).integers(3, 500, (1, 12))
    said = Session.open(tiny_engine).backend.score(ids)[0]
    backend.start(1)
    found = [backend.extend(ids[:, :9], np.array([9]))]
    found += [backend.extend(ids[:, at : at + 1], np.array([1])) for at in (9, 10, 11)]
    np.testing.assert_allclose(np.concatenate(found), said[8:], atol=2e-4)
    with pytest.raises(EngineError, match=r"grow to 13 tokens.*at most 12"):
        backend.extend(ids[:, :1], np.array([1]))


def test_what_is_asked_of_the_cuda_provider(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = ort.open_graph

    def opened(file: Path, limits: Limits, cuda_options: Any = None) -> Any:
        asked.append((limits.provider, cuda_options))
        return real(file, Limits())

    monkeypatch.setattr(ort, "open_graph", opened)
    monkeypatch.setattr(ort, "CudaMemory", lambda extra: HostMemory() if extra == "gpu" else None)
    spec = Session.open(tiny_engine).spec
    asked.clear()
    for provider, state in (("cpu", HostState), ("cuda", DeviceState), ("tensorrt", DeviceState)):
        backend = ort.OrtBackend(tiny_engine, spec, Limits(provider=provider))
        assert isinstance(backend._state, state)
        assert getattr(backend._state, "_graphs", False) is (provider == "cuda")
    assert asked == [("cpu", None), ("cuda", {"enable_cuda_graph": "1"}), ("tensorrt", None)]


def test_where_no_graph_can_be_captured_that_is_said_and_other_errors_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(file: Path, limits: Limits, cuda_options: Any = None) -> str:
        if cuda_options:
            raise EngineError(f"This session cannot use the {file.name} feature as requested.")
        return "without"

    monkeypatch.setattr(ort, "open_graph", opened)
    assert ort._captured(Path("graph capture"), Limits()) == ("without", False)
    assert "without CUDA graphs, so decoding is slower: This session cannot" in capsys.readouterr().err
    with pytest.raises(EngineError, match="the other feature"):
        ort._captured(Path("other"), Limits())


def test_onnxruntime_has_what_a_device_is_bound_by() -> None:
    """The names of I/O binding by address, in the package itself."""
    binding = onnxruntime.IOBinding
    assert binding.bind_input.__code__.co_varnames[:7] == (
        *("self", "name", "device_type", "device_id", "element_type", "shape", "buffer_ptr"),
    )
    assert binding.bind_output.__code__.co_varnames[:7] == (
        *("self", "name", "device_type", "device_id", "element_type", "shape", "buffer_ptr"),
    )


def test_onnxruntime_refuses_a_graph_in_the_words_that_are_looked_for() -> None:
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("onnxruntime_pybind11_state*")
    assert b"cannot use the graph capture feature" in library.read_bytes()


def test_what_brings_cuda_bindings_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match=r"flabc\[gpu\]"):
        ort.CudaMemory("gpu")


@pytest.mark.cuda
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(), reason="this onnxruntime has no CUDA provider"
)
def test_the_cuda_provider_says_what_the_processor_says(tiny_engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, and steps of which the first ones come before a graph is captured and the last ones from it."""
    spec = Session.open(tiny_engine).spec
    backends = [
        ort.OrtBackend(tiny_engine, spec, Limits(max_batch=2, provider=provider)) for provider in ("cpu", "cuda")
    ]
    assert "without CUDA graphs" not in capsys.readouterr().err
    draw = np.random.default_rng(0)
    prompts = draw.integers(3, 500, (2, 9))
    for backend in backends:
        backend.start(0)
    np.testing.assert_allclose(*[backend.join(prompts, np.array([4, 9])) for backend in backends], atol=1e-3)
    for _ in range(12):
        ids = draw.integers(3, 500, (2, 1))
        np.testing.assert_allclose(*[backend.extend(ids, np.array([1, 1])) for backend in backends], atol=1e-3)
