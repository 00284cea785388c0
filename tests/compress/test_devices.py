"""Devices and precisions."""

from __future__ import annotations

import timeit

import pytest
import torch
from torch.nn import functional

from flabc.compress import devices
from flabc.errors import UsageError


def test_a_device_that_torch_lacks_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="nonsense"):
        devices.device_named("nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda"):
            devices.device_named("cuda")


@pytest.mark.usefixtures("one_thread")
def test_the_precision_on_a_processor_is_one_it_multiplies_fast() -> None:
    """Emulated bfloat16 takes three to five times as long as float32."""

    def seconds(dtype: torch.dtype) -> float:
        weight, tokens = torch.ones(1024, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        return min(timeit.repeat(lambda: functional.linear(tokens, weight), number=1, repeat=20))

    found = devices.compute_dtype(torch.device("cpu"))
    assert found in (torch.bfloat16, torch.float32)
    assert seconds(found) < 1.5 * seconds(torch.float32)


def test_a_precision_by_its_name() -> None:
    cpu = torch.device("cpu")
    assert devices.dtype_named("bfloat16", cpu) == torch.bfloat16
    assert devices.dtype_named("auto", cpu) == devices.compute_dtype(cpu)
    assert devices.name_of(torch.bfloat16) == "bfloat16"
