"""Where torch computes, and in which precision."""

from __future__ import annotations

import platform
from typing import Literal

import torch

from flabc.errors import UsageError


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
