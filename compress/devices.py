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


def ahead(begin: Callable[[int], Callable[[], T]], items: Iterable[int]) -> Iterator[T]:
    """What is made of each item, the next by another thread while one is in use: two are there at most.

    Whoever takes them has to let go of one before it asks for the next.

    Args:
        begin: from an item to what makes it; called here, when the one before the last was let go of.
        items: in their order.
    """
    with ThreadPoolExecutor(1) as pool:
        coming = None
        for item in items:
            ready, coming = coming, pool.submit(begin(item))
            if ready is not None:
                yield ready.result()
                del ready
        if coming is not None:
            yield coming.result()


def beside(make: Callable[[int], dict[str, Tensor]], device: torch.device) -> Callable[[int], Callable[[], Any]]:
    """How tensors are made on a CUDA device while it computes with others, for ``ahead``.

    Their copies go through a stream of their own, and wait until what was asked of the device before is done: Python
    runs ahead of it, and what it let go of is there until then. PyTorch, "CUDA semantics", "CUDA streams" and
    ``Tensor.record_stream``. Untested: no GPU was at hand.
    """
    cuda: Any = torch.cuda
    copying, computing = cuda.Stream(device), cuda.current_stream(device)

    def begin(item: int) -> Callable[[], dict[str, Tensor]]:
        before = computing.record_event()

        def made() -> dict[str, Tensor]:
            before.synchronize()
            with cuda.stream(copying):
                tensors = make(item)
            copying.synchronize()
            for tensor in tensors.values():
                tensor.record_stream(computing)  # or it could be written over while it is still computed with
            return tensors

        return made

    return begin


def forget_peak(device: torch.device) -> None:
    """Let ``peak_mib`` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """The most memory of a CUDA device that torch used or still waited for, MiB; None elsewhere."""
    if device.type != "cuda":
        return None
    return float(torch.cuda.memory_stats(device)["active_bytes.all.peak"]) / 2**20
