"""A GPU's memory: allocated, written and read through CUDA's runtime.

CUDA Python, ``cuda.bindings.runtime``. Untested on a GPU: none was at hand.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from flabc.errors import EngineError, require

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
        """Copy bytes from one address to another."""
        ...


class CudaMemory:
    """``Memory`` through CUDA's runtime. What was not freed goes when the process ends.

    Raises:
        MissingExtraError: if cuda-bindings is not installed.
        EngineError: if there is no GPU, or not enough memory.
    """

    def __init__(self) -> None:
        self._cuda = require("cuda.bindings.runtime", "tensorrt")
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
        self._wait()  # the array may go

    def download(self, address: int, array: Array) -> None:
        """Copy from an address into an array; returns when it is there."""
        self._copy(array.ctypes.data, address, array.nbytes, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        self._wait()

    def copy(self, to: int, source: int, size: int) -> None:
        """Copy bytes from one address to another."""
        self._copy(to, source, size, self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._do(self._cuda.cudaMemcpyAsync(to, source, size, kind, self._stream))

    def _wait(self) -> None:
        self._do(self._cuda.cudaStreamSynchronize(self._stream))

    def _do(self, result: tuple[Any, ...]) -> Any:
        error, *values = result
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise EngineError(f"CUDA says: {self._cuda.cudaGetErrorString(error)[1].decode()}.")
        return values[0] if values else None
