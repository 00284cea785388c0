"""Products over tokens, against numpy in float64."""

from __future__ import annotations

import pytest
import torch

from flabc.compress.gram import product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_rounded_but_the_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3000, size, generator=generator).to(dtype) for size in (70, 40))
    exact = left.double().numpy().T @ right.double().numpy()
    torch.testing.assert_close(product(left, right).double(), torch.from_numpy(exact), rtol=1e-4, atol=2e-3)


def test_float32_is_not_computed_in_bfloat16_afterwards() -> None:
    product(torch.ones(4, 4, dtype=torch.bfloat16), torch.ones(4, 4, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)
    torch.testing.assert_close(left @ right, (left.double() @ right.double()).float(), rtol=1e-5, atol=1e-5)
