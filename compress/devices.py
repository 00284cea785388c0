"""Where torch computes, and in which precision."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from flabc.errors import UsageError

T = TypeVar("T")


def device_named(name: str) -> torch.device:
    """A torch device.

    Raises:
        UsageError: if torch cannot compute there.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UsageError(f"Torch cannot compute on {name!r}: {str(error).splitlines()[0]}") from error
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that scores well: bfloat16 where the hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        # Where AVX-512 lacks bfloat16, oneDNN "supports" it too, by emulation that is slower than float32.
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        fast = torch.cpu._is_avx512_bf16_supported() if x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return torch.float32


def dtype_named(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """The dtype of a name; ``auto`` is what the device computes fastest in."""
    found: torch.dtype = compute_dtype(device) if name == "auto" else getattr(torch, name)
    return found


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name, as options have it."""
    return str(dtype).removeprefix("torch.")


def ahead(make: Callable[[int], T], items: Iterable[int]) -> Iterator[T]:
    """What is made of each item, the next by another thread while one is in use: two are there at most.

    Whoever takes them has to let go of one before it asks for the next.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            ready, coming = coming, pool.submit(make, item)
            if ready is not None:
                yield ready.result()
                del ready
        if coming is not None:
            yield coming.result()


def copied_beside(make: Callable[[int], dict[str, Tensor]], device: torch.device) -> Callable[[int], dict[str, Tensor]]:
    """Make tensors on a CUDA device while it computes with others: their copies go through a stream of their own.

    PyTorch, "CUDA semantics", "CUDA streams" and ``Tensor.record_stream``. Untested: no GPU was at hand.
    """
    cuda: Any = torch.cuda
    beside, computing = cuda.Stream(device), cuda.current_stream(device)

    def made(item: int) -> dict[str, Tensor]:
        with cuda.stream(beside):
            tensors = make(item)
        beside.synchronize()
        for tensor in tensors.values():
            tensor.record_stream(computing)  # or the memory could be written to while it is still computed with
        return tensors

    return made


def peak_mib(device: torch.device) -> float | None:
    """The most memory of a CUDA device that torch had in use so far, MiB; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
