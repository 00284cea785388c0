from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from flabc.runtime.sampling import Sampler, SamplingParams, drawn, narrowed, nucleus, penalised, scored, tempered

logits = st.lists(st.floats(-20, 20), min_size=2, max_size=20).map(lambda some: np.array(some, np.float32))


Array = npt.NDArray[Any]


def shares(scores: Array) -> Array:
    """Probabilities of scores."""
    p: Array = np.exp(scores.astype(float) - scores.max())
    return p / p.sum()


@given(logits)
def test_temperature_zero_takes_the_most_likely(some: Array) -> None:
    assert Sampler(SamplingParams())(some) == (int(np.argmax(some)), None, ())


@given(logits, st.floats(0.05, 1))
def test_the_nucleus_is_the_smallest_set_that_is_enough(some: Array, top_p: float) -> None:
    p, inside = shares(some), np.zeros(len(some), bool)
    inside[nucleus(some.astype(float) - some.max(), top_p)] = True
    assert p[inside].sum() >= top_p - 1e-9
    assert p[inside].sum() - p[inside].min() <= top_p + 1e-9
    assert not (~inside).any() or p[~inside].max() <= p[inside].min()


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.7, "top_k": 900, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.2, "repetition_penalty": 0.7},
    ],
)
def test_logits_are_processed_as_transformers_does(spread: float, change: dict[str, Any]) -> None:
    """What ``generate`` itself builds of the same settings, in its order."""
    import torch
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
    given = {"do_sample": True, "top_k": 0, **change}
    seen = [3, 17, 17, 2999, 40]
    theirs = model._get_logits_processor(GenerationConfig(**given), input_ids_seq_length=len(seen))
    raw = np.random.default_rng(4).normal(0, spread, 3000).astype(np.float32)
    params = SamplingParams(**{"temperature": 1.0, **change})
    scores = tempered(penalised(raw, set(seen), params.repetition_penalty), params.temperature)
    kept = narrowed(scores, params)
    ours = scores if kept is None else np.full_like(scores, -np.inf)
    ours[... if kept is None else kept] = scores[... if kept is None else kept]
    expected = theirs(torch.tensor([seen]), torch.from_numpy(raw)[None]).softmax(-1)[0].numpy()
    np.testing.assert_allclose(shares(ours), expected, rtol=2e-4, atol=1e-12)
    assert np.array_equal(np.isfinite(ours), expected > 0)


def test_a_penalty_knows_the_prompt_and_what_was_drawn() -> None:
    logits = np.array([1.0, 0.9, 0.8, -1.0], np.float32)
    draw = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0])
    assert [draw(logits).id for _ in range(3)] == [1, 2, 0]


@given(logits, st.integers(0, 20))
def test_log_probabilities_are_torchs(some: Array, top: int) -> None:
    import torch

    expected = torch.from_numpy(some).double().log_softmax(-1)
    token = scored(some, 1, top)
    assert token.logprob == pytest.approx(float(expected[1]), abs=1e-5)
    best = expected.topk(min(top, len(some)))
    np.testing.assert_allclose([value for _, value in token.top], best.values.numpy(), atol=1e-5)
    np.testing.assert_allclose(expected[[i for i, _ in token.top]].numpy(), best.values.numpy(), atol=1e-5)


def test_log_probabilities_are_the_models_own_whatever_is_drawn_from() -> None:
    some = np.array([1.0, 2.0, 3.0], np.float32)
    params = SamplingParams(temperature=0.3, top_k=1, repetition_penalty=1.2, logprobs=2)
    token = Sampler(params, prompt_ids=[2])(some)
    assert (token.id, [i for i, _ in token.top]) == (2, [2, 1])
    assert token.logprob == pytest.approx(float(np.log(shares(some)[2])))


def test_almost_no_temperature_takes_the_most_likely() -> None:
    some = np.array([1.0, 3.0, 2.0], np.float32)
    assert Sampler(SamplingParams(temperature=1e-300, seed=0))(some).id == 1


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    flat = np.zeros(1000, np.float32)

    def draw(seed: int) -> list[int]:
        one = Sampler(SamplingParams(temperature=1.0, seed=seed))
        return [one(flat).id for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_draws_follow_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.2])
    one = Sampler(SamplingParams(temperature=1.0, seed=0))
    drawn = np.bincount([one(np.log(p).astype(np.float32)).id for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, p, atol=0.03)


@given(
    st.lists(st.just(0.0) | st.floats(2**-60, 1, width=32), min_size=1, max_size=1200),
    st.floats(0, 1, exclude_max=True),
)
def test_a_number_falls_where_the_running_sum_says(weights: list[float], at: float) -> None:
    some = np.array(weights, np.float32)
    if not some.any():
        some[-1] = 1
    found = drawn(some, at)
    running = np.cumsum(some, dtype=np.float64) / some.sum(dtype=np.float64)
    assert some[found] > 0
    assert (running[found - 1] if found else 0) <= at + 1e-5
    assert at <= running[found] + 1e-5


def test_temperature_sharpens_the_distribution() -> None:
    p = np.array([0.5, 0.3, 0.2])
    one = Sampler(SamplingParams(temperature=0.5, seed=0))  # squares probabilities
    drawn = np.bincount([one(np.log(p).astype(np.float32)).id for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(drawn, p**2 / (p**2).sum(), atol=0.03)


def test_what_is_outside_the_nucleus_is_never_drawn() -> None:
    p = np.array([0.05, 0.5, 0.15, 0.3])
    one = Sampler(SamplingParams(temperature=1.0, top_p=0.7, seed=0))
    assert {one(np.log(p).astype(np.float32)).id for _ in range(300)} == {1, 3}


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"max_tokens": 0}, {"seed": -1}, {"tempo": 1}]
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams.model_validate(wrong)
