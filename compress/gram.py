"""Sums over tokens of products of activations: what every closed form here starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    exact = left.dtype == right.dtype == torch.bfloat16
    first = left.float()
    second = first if right is left else right.float()
    with _bfloat16_units() if exact else nullcontext():
        return first.T @ second


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """G + λI with λ as a share of G's mean diagonal."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


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
