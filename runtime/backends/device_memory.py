"""A GPU's memory: allocated, written and read through CUDA's runtime, and what backends keep in it.

CUDA Python, ``cuda.bindings.runtime``. Untested on a GPU: none was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flabc.errors import EngineError, require
from flabc.spec import ModelSpec

Array = npt.NDArray[Any]


class Memory(Protocol):
    """A GPU's memory, and a stream on which copies and engines run one after another."""

    stream: int

    def allocate(self, size: int) -> int:
        """The address of so many bytes, all zero."""
        ...

    def free(self, address: int) -> None:
        """Give back what was allocated there."""
        ...

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to an address."""
        ...

    def download(self, address: int, array: Array) -> None:
        """Copy from an address into an array; returns when it is there."""
        ...

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes from one address to another, on the stream."""
        ...

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        ...


class CudaMemory:
    """``Memory`` through CUDA's runtime. What was not freed goes when the process ends.

    Args:
        extra: which extra of flabc brings cuda-bindings to whom it is for.

    Raises:
        MissingExtraError: if cuda-bindings is not installed.
        EngineError: if there is no GPU, or not enough memory.
    """

    def __init__(self, extra: str) -> None:
        self._cuda = require("cuda.bindings.runtime", extra)
        self._stream = self._do(self._cuda.cudaStreamCreate())
        self.stream = int(self._stream)

    def allocate(self, size: int) -> int:
        """The address of so many bytes, all zero: what a mask hides must be numbers too."""
        address = int(self._do(self._cuda.cudaMalloc(max(size, 1))))
        self._do(self._cuda.cudaMemsetAsync(address, 0, size, self._stream))
        return address

    def free(self, address: int) -> None:
        """Give back what was allocated there."""
        self._do(self._cuda.cudaFree(address))

    def upload(self, address: int, array: Array) -> None:
        """Copy an array to an address."""
        self._copy(address, array.ctypes.data, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
        self.wait()  # the array may go

    def download(self, address: int, array: Array) -> None:
        """Copy from an address into an array; returns when it is there."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self.wait()

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes from one address to another, on the stream."""
        self._copy(to, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._do(self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        self._do(self._cuda.cudaStreamSynchronize(self._stream))

    def _do(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA says: {self._cuda.cudaGetErrorString(error)[1].decode()}.")
        return values[0] if values else None


class Room:
    """Memory for what goes in and out by name, kept for the next time if it is large enough."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._buffers: dict[str, tuple[int, int]] = {}  # address and size

    def at(self, name: str, size: int) -> int:
        """The address of so many bytes at least."""
        address, room = self._buffers.get(name, (0, 0))
        if room < size:
            if room:
                self._memory.free(address)
            address = self._memory.allocate(size)
            self._buffers[name] = (address, size)
        return address


class Cache:
    """Keys and values of every layer that attends, (rows, KV heads, M, H) each, in a GPU's memory.

    Args:
        spec: the model's shapes.
        memory: where they lie.
        rows: of how many sequences.
        places: M.
        itemsize: bytes of a number.
    """

    def __init__(self, spec: ModelSpec, memory: Memory, rows: int, places: int, itemsize: int) -> None:
        self._memory = memory
        self._shapes = {
            f"{index}.{kind}": (layer.num_key_value_heads, places, spec.head_dim)
            for index, layer in enumerate(spec.layers)
            if layer.has_attention
            for kind in ("key", "value")
        }
        self._bytes = {name: itemsize * int(np.prod(shape)) for name, shape in self._shapes.items()}  # of a row
        self._at = {name: memory.allocate(rows * size) for name, size in self._bytes.items()}
        self._rows = rows

    def rows(self, first: int, count: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Address and shape of some rows of every layer's keys and values."""
        return {
            name: (self._at[name] + first * self._bytes[name], (count, *shape)) for name, shape in self._shapes.items()
        }

    @cached_property
    def _aside(self) -> int:
        """Room for all rows of a layer's keys or values."""
        return self._memory.allocate(self._rows * max(self._bytes.values(), default=0))

    def read(self, row: int, length: int) -> dict[str, Array]:
        """A copy of a row's first places, (KV heads, length, H) of bytes of numbers each."""
        copies = {}
        for name, shape in self._shapes.items():
            whole = np.empty((*shape[:2], self._bytes[name] // int(np.prod(shape[:2]))), np.uint8)
            self._memory.download(self._at[name] + row * self._bytes[name], whole)
            copies[name] = whole[:, :length].copy()
        return copies

    def write(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        """Write a copy's first places to a row; what is behind them becomes nought."""
        for name, shape in self._shapes.items():
            whole = np.zeros((*shape[:2], saved[name].shape[2]), np.uint8)
            whole[:, :length] = saved[name][:, :length]
            self._memory.upload(self._at[name] + row * self._bytes[name], whole)

    def move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy rows, all at once: moves are (to, from). They go by way of memory aside, as they may overlap."""
        for name, size in self._bytes.items():
            for at, (_, source) in enumerate(moves):
                self._memory.copy(self._aside + at * size, self._at[name] + source * size, size)
            for at, (to, _) in enumerate(moves):
                self._memory.copy(self._at[name] + to * size, self._aside + at * size, size)
