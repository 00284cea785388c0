"""What an ONNX Runtime session reads and writes while it decodes, bound where it lies: in the host's memory or a GPU's.

The cache is bound as past and as present, so that GroupQueryAttention appends in place instead of copying all of it at
every token. ONNX Runtime documentation: "I/O Binding"; "CUDA Execution Provider", "Using CUDA Graphs".

Letters in shape comments: B sequences, S new tokens, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flabc.errors import EngineError, require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .device_memory import Cache, Memory, Room

Array = npt.NDArray[Any]

#: The run option that says which CUDA graph is captured and replayed, and its value for none.
GRAPH_ID, NO_GRAPH = "gpu_graph_id", -1


class State(Protocol):
    """The cache of a session, and a step on it."""

    def run(self, first: int, ids: Ids, lengths: Ids) -> Logits:
        """Append tokens to B of the cache's rows.

        Args:
            first: the first of the rows.
            ids: (B, S).
            lengths: of the rows after the step, (B,).

        Returns:
            logits after each row's last token, (B, V).
        """
        ...

    def move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy rows, all at once: moves are (to, from). Of each the first ``used`` places count."""
        ...

    def read(self, row: int, length: int) -> dict[str, Array]:
        """A copy of a row's first places, in the host's memory."""
        ...

    def write(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        """Write a copy's first places to a row."""
        ...


class HostState:
    """A cache of numpy arrays. See ``State`` for the contract.

    Args:
        session: of the graph.
        spec: the model's shapes.
        limits: how many rows and places there are.
    """

    def __init__(self, session: Any, spec: ModelSpec, limits: Limits) -> None:
        self._session = session
        self._value = require("onnxruntime", "cpu").OrtValue.ortvalue_from_numpy
        self._cache = new_cache(spec, limits.max_batch, limits.max_length, cache_dtype(session))
        self._bindings: dict[tuple[int, int], Any] = {}  # by first row and end

    def run(self, first: int, ids: Ids, lengths: Ids) -> Logits:
        """Logits after the last tokens of the rows, which are then ``lengths`` long."""
        rows = first, first + len(ids)
        if rows not in self._bindings:
            self._bindings[rows] = self._bound(*rows)
        binding = self._bindings[rows]
        binding.bind_cpu_input("input_ids", np.ascontiguousarray(ids))
        binding.bind_cpu_input("attention_mask", _mask(lengths, int(lengths.max())))
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[-1].numpy()  # bound last
        return logits[:, -1].copy()  # the next run writes to the same memory

    def _bound(self, first: int, end: int) -> Any:
        binding = self._session.io_binding()
        for name, buffer in self._cache.items():
            value = self._value(buffer[first:end])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits", "cpu")
        return binding

    def move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy rows, all at once; what is behind ``used`` is not touched."""
        move_rows(self._cache, moves, used)

    def read(self, row: int, length: int) -> dict[str, Array]:
        """A copy of a row's first places, (KV heads, length, head_dim) each."""
        return save_row(self._cache, row, length)

    def write(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        """Write a copy's first places to a row."""
        restore_row(self._cache, row, saved, length)


@dataclass(frozen=True)
class _Step:
    """One way of running the session: what is bound where, and by which options."""

    binding: Any
    room: Room
    options: Any


class DeviceState:
    """A cache in a GPU's memory, where all that goes in and out lies too. See ``State`` for the contract.

    A CUDA graph is of one shape and of fixed addresses. So where there are graphs a step of one token has memory of its
    own for every span of rows, and a mask as long as the cache, of which what is not attended to is 0; prompts run
    without one. Untested on a GPU: none was at hand; over the host's memory it is compared with ``HostState``.

    Args:
        session: of the graph.
        spec: the model's shapes.
        limits: how many rows and places there are.
        memory: the GPU's.
        graphs: whether the session captures graphs.
        device: what ONNX Runtime calls it.
    """

    def __init__(
        self, session: Any, spec: ModelSpec, limits: Limits, memory: Memory, *, graphs: bool, device: str = "cuda"
    ) -> None:
        self._session, self._memory, self._graphs, self._device = session, memory, graphs, device
        self._runtime = require("onnxruntime", "gpu")
        self._dtype = np.dtype(cache_dtype(session))
        self._cache = Cache(spec, memory, limits.max_batch, limits.max_length, self._dtype.itemsize)
        self._places, self._vocab = limits.max_length, spec.vocab_size
        self._loose = Room(memory)  # of what runs without a graph
        self._steps: dict[tuple[int, int], _Step] = {}  # by first row and end

    def run(self, first: int, ids: Ids, lengths: Ids) -> Logits:
        """Logits after the last tokens of the rows, which are then ``lengths`` long."""
        given = {"input_ids": np.ascontiguousarray(ids)}
        if self._graphs and ids.shape[1] == 1:
            given["attention_mask"] = _mask(lengths, self._places)
            rows = first, first + len(ids)
            if rows not in self._steps:
                self._steps[rows] = self._step(first, given, Room(self._memory), graph=1 + len(self._steps))
            step = self._steps[rows]
        else:
            given["attention_mask"] = _mask(lengths, int(lengths.max()))
            step = self._step(first, given, self._loose, graph=NO_GRAPH)
        for name, array in given.items():
            self._memory.upload(step.room.at(name, array.nbytes), array)
        self._session.run_with_iobinding(step.binding, step.options)  # returns when the GPU is done
        logits = np.empty((len(ids), 1, self._vocab), np.float32)
        self._memory.download(step.room.at("logits", logits.nbytes), logits)
        return logits[:, -1]

    def _step(self, first: int, given: Mapping[str, Array], room: Room, graph: int) -> _Step:
        """Bind rows from ``first`` on and inputs of these shapes; ids of graphs count from 1, as 0 is ORT's own."""
        rows = len(given["input_ids"])
        binding = self._session.io_binding()

        def bind(into: Any, name: str, dtype: npt.DTypeLike, shape: Sequence[int], address: int) -> None:
            into(name, self._device, 0, dtype, list(shape), address)

        for name, array in given.items():
            bind(binding.bind_input, name, array.dtype, array.shape, room.at(name, array.nbytes))
        for name, (address, shape) in self._cache.rows(first, rows).items():
            bind(binding.bind_input, f"past_key_values.{name}", self._dtype, shape, address)
            bind(binding.bind_output, f"present.{name}", self._dtype, shape, address)
        size = 4 * rows * self._vocab
        bind(binding.bind_output, "logits", np.float32, (rows, 1, self._vocab), room.at("logits", size))
        options = self._runtime.RunOptions()
        options.add_run_config_entry(GRAPH_ID, str(graph))
        return _Step(binding, room, options)

    def move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy whole rows, all at once."""
        self._cache.move(moves)
        self._memory.wait()  # the session runs on a stream of its own

    def read(self, row: int, length: int) -> dict[str, Array]:
        """A copy of a row's first places, (KV heads, length, bytes of head_dim numbers) each."""
        return self._cache.read(row, length)

    def write(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        """Write a copy's first places to a row."""
        self._cache.write(row, saved, length)


def _mask(lengths: Ids, places: int) -> npt.NDArray[np.int64]:
    """What each row attends to, (B, places)."""
    return (np.arange(places) < lengths[:, None]).astype(np.int64)


def cache_dtype(session: Any) -> npt.DTypeLike:
    """What keys and values are in a graph: what it computes in.

    Raises:
        EngineError: if that is bfloat16, which numpy does not have.
    """
    kinds = {given.type for given in session.get_inputs() if given.name.startswith("past_key_values")}
    if "tensor(bfloat16)" in kinds:
        raise EngineError(
            "An engine that computes in bfloat16 is run by TensorRT or onnxruntime-genai, not here.",
            expected="keys and values in float32 or float16",
            found="bfloat16",
            fix="Export it with --precision fp16, or for tensorrt.",
        )
    return np.float16 if kinds == {"tensor(float16)"} else np.float32


def new_cache(spec: ModelSpec, batch: int, length: int, dtype: npt.DTypeLike) -> dict[str, Array]:
    """Keys and values of every layer that attends, (batch, KV heads, length, head_dim) each."""
    return {
        f"{layer}.{kind}": np.zeros((batch, shape.num_key_value_heads, length, spec.head_dim), dtype)
        for layer, shape in enumerate(spec.layers)
        if shape.has_attention
        for kind in ("key", "value")
    }


def move_rows(cache: Mapping[str, Array], moves: Sequence[tuple[int, int]], used: int) -> None:
    """Copy the first ``used`` places of rows, all at once: moves are (to, from)."""
    to, source = (list(places) for places in zip(*moves, strict=True))
    for buffer in cache.values():
        buffer[to, :, :used] = buffer[source, :, :used]


def save_row(cache: Mapping[str, Array], row: int, length: int) -> dict[str, Array]:
    """A copy of one row's first ``length`` places."""
    return {name: buffer[row, :, :length].copy() for name, buffer in cache.items()}


def restore_row(cache: Mapping[str, Array], row: int, saved: Mapping[str, Array], length: int) -> None:
    """Write the first ``length`` places of a copy to a row."""
    for name, buffer in cache.items():
        buffer[row, :, :length] = saved[name][:, :length]
