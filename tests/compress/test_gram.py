"""Products over tokens, against numpy in float64."""

from __future__ import annotations

import pytest
import torch

from flabc.compress.gram import STRIPS, TOKENS, Gram


def gram(x: torch.Tensor) -> torch.Tensor:
    found = Gram(x.shape[1], x.device)
    for part in x.split(TOKENS + 100):
        found.add(part)
    return found.matrix()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, STRIPS - 1, STRIPS, 70])
def test_nothing_is_rounded_but_the_sum(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(2 * TOKENS + 300, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = x.double().numpy().T @ x.double().numpy()
    torch.testing.assert_close(gram(x).double(), torch.from_numpy(exact), rtol=1e-4, atol=2e-3)


def test_float32_is_not_computed_in_bfloat16_afterwards() -> None:
    gram(torch.ones(4, 4, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=1e-5, atol=1e-5)
