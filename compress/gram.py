"""Sums over tokens of products of activations: what every closed form here starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Damping of the normal equations, as a share of the mean diagonal (GPTQ's convention, Frantar et al., 2022).
DAMPING = 0.01


def product(left: Tensor, right: Tensor) -> Tensor:
    """leftᵀ right in float32, (tokens, A) and (tokens, B) to (A, B).

    Bfloat16 inputs lose nothing: their products are exact in float32 and are added up there, on the units that
    multiply bfloat16 where the processor has them. A product in bfloat16 would round the sums.
    """
    if left.dtype == right.dtype == torch.bfloat16:
        with _bfloat16_units():
            return left.float().T @ right.float()
    return left.float().T @ right.float()


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """G + λI with λ as a share of G's mean diagonal."""
    ridge = damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + ridge


@contextmanager
def _bfloat16_units() -> Iterator[None]:
    """Let float32 products be made of bfloat16 inputs, which rounds inputs that are not bfloat16 already."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
