"""Sums over tokens of products of activations: what every closed form here starts from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Damping of the normal equations, as a share of the mean diagonal (GPTQ's convention, Frantar et al., 2022).
DAMPING = 0.01

#: Tokens multiplied at once.
TOKENS = 2048

#: Strips of rows of a Gram matrix, each computed from its diagonal on: with four, 5/8 of the whole are computed.
STRIPS = 4


class Gram:
    """The sum over tokens of x xᵀ, float32: the half above the diagonal is computed, the other is its mirror.

    Bfloat16 inputs lose nothing: their products are exact in float32 and are added up there, on the units that
    multiply bfloat16 where the processor has them. A product in bfloat16 would round the sums.

    Args:
        size: F, how long an input is.
        device: where to compute.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self._sum = torch.zeros(size, size, device=device)

    def add(self, x: Tensor) -> None:
        """Add the products of inputs, (tokens, F)."""
        step = -(-x.shape[1] // STRIPS)
        with units(x.dtype):
            for part in pieces(x):
                for at in range(0, x.shape[1], step):
                    self._sum[at : at + step, at:].addmm_(part[:, at : at + step].T, part[:, at:])

    def matrix(self) -> Tensor:
        """The sum so far, (F, F). It is this object's own: what is added later changes it."""
        return self._sum.triu_().add_(self._sum.triu(1).T)


def pieces(x: Tensor) -> Iterator[Tensor]:
    """Inputs in float32, as many at once as the processor's cache likes, (``TOKENS``, F) each."""
    parts: tuple[Tensor, ...] = x.split(TOKENS)  # type: ignore[no-untyped-call]
    return (part.float() for part in parts)


def damped(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """G + λI with λ as a share of G's mean diagonal."""
    result = gram.clone()
    result.diagonal().add_(damping * gram.diagonal().mean())
    return result


@contextmanager
def units(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products be made on the units for bfloat16 if the factors are bfloat16 numbers already."""
    if dtype != torch.bfloat16:
        yield
        return
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
