"""Allocations: what they promise for every set of pools, and FLAP's threshold by brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flabc.compress.allocate import ALLOCATIONS, Pool


@st.composite
def pools(draw: st.DrawFn) -> list[Pool]:
    """Layers with channels in steps and heads one by one."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    found = []
    for layer in range(draw(st.integers(1, 5))):
        for units, step, cost in ((draw(st.integers(8, 60)), draw(st.sampled_from([1, 4, 8])), 3), (8, 1, 40)):
            worth = torch.from_numpy(rng.gamma(1 + layer, size=units))
            found.append(Pool(layer, units, cost, step, min(step, units), worth))
    return found


def parameters(found: list[Pool], left: list[int]) -> int:
    return sum((pool.units - units) * pool.price for pool, units in zip(found, left, strict=True))


@given(found=pools(), share=st.floats(0.05, 0.7), name=st.sampled_from(sorted(ALLOCATIONS)))
def test_what_is_left_is_aligned_and_never_nothing(found: list[Pool], share: float, name: str) -> None:
    total = sum(pool.units * pool.price for pool in found)
    left = ALLOCATIONS[name].allot(found, share * total, 0.03)
    for pool, units in zip(found, left, strict=True):
        assert units == pool.units or units % pool.step == 0
        assert pool.least <= units <= pool.units


@given(found=pools(), share=st.floats(0.05, 0.7), name=st.sampled_from(["global", "marginal"]))
def test_one_threshold_removes_what_was_asked_and_less_than_a_step_more(
    found: list[Pool], share: float, name: str
) -> None:
    asked = share * sum(pool.units * pool.price for pool in found)
    gone = parameters(found, ALLOCATIONS[name].allot(found, asked, 0))
    most = sum((pool.units - pool.least) * pool.price for pool in found)
    assert min(asked, most - max(pool.step * pool.price for pool in found)) <= gone
    assert gone < asked + max(pool.step * pool.price for pool in found)


@given(found=pools(), share=st.floats(0.05, 0.6))
def test_global_is_a_threshold_on_standardised_worth(found: list[Pool], share: float) -> None:
    """With steps of one unit, no unit that goes is worth more than one that stays (FLAP)."""
    found = [Pool(p.layer, p.units, p.price, 1, 1, p.worth) for p in found]
    left = ALLOCATIONS["global"].allot(found, share * sum(p.units * p.price for p in found), 0)
    gone, stays = [], []
    for pool, units in zip(found, left, strict=True):
        assert pool.worth is not None
        worth = np.sort((pool.worth.numpy() - pool.worth.numpy().mean()) / pool.worth.numpy().std(ddof=1))
        gone += worth[: pool.units - units].tolist()
        stays += worth[pool.units - units :].tolist() if units > 1 else []
    assert max(gone, default=-np.inf) <= min(stays, default=np.inf) + 1e-9


def test_a_ramp_takes_more_of_deeper_layers() -> None:
    found = [Pool(layer, 100, 1) for layer in range(5)]
    assert ALLOCATIONS["ramp"].allot(found, 100, 0.05) == [90, 85, 80, 75, 70]
    assert ALLOCATIONS["uniform"].allot(found, 100, 0.05) == [80] * 5


def test_ranking_without_worth_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError):
        ALLOCATIONS["global"].allot([Pool(0, 10, 1)], 5, 0)
