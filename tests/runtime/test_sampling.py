from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flabc.runtime.sampling import SamplingParams, nucleus, sampler

logits = st.lists(st.floats(-20, 20), min_size=2, max_size=20).map(lambda some: np.array(some, np.float32))


@given(logits)
def test_temperature_zero_takes_the_most_likely(some: np.ndarray) -> None:  # type: ignore[type-arg]
    assert sampler(SamplingParams())(some) == int(np.argmax(some))


@given(logits, st.floats(0.05, 1))
def test_the_nucleus_is_the_smallest_set_that_is_enough(some: np.ndarray, top_p: float) -> None:  # type: ignore[type-arg]
    p = np.exp(some.astype(float) - some.max())
    p /= p.sum()
    kept = nucleus(p, top_p)
    inside = kept > 0
    assert kept.sum() == pytest.approx(1)
    assert p[inside].sum() >= top_p - 1e-9
    assert p[inside].sum() - p[inside].min() <= top_p + 1e-9
    assert not (~inside).any() or p[~inside].max() <= p[inside].min()


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    flat = np.zeros(1000, np.float32)

    def draw(seed: int) -> list[int]:
        one = sampler(SamplingParams(temperature=1.0, seed=seed))
        return [one(flat) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.2])
    one = sampler(SamplingParams(temperature=1.0, seed=0))
    drawn = np.bincount([one(np.log(p).astype(np.float32)) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, p, atol=0.03)


def test_temperature_sharpens_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.2])
    one = sampler(SamplingParams(temperature=0.5, seed=0))  # squares probabilities
    drawn = np.bincount([one(np.log(p).astype(np.float32)) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, p**2 / (p**2).sum(), atol=0.03)


def test_what_is_outside_the_nucleus_is_never_drawn() -> None:
    p = np.array([0.05, 0.5, 0.15, 0.3])
    one = sampler(SamplingParams(temperature=1.0, top_p=0.7, seed=0))
    assert {one(np.log(p).astype(np.float32)) for _ in range(300)} == {1, 3}


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"tempo": 1}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams.model_validate(wrong)
