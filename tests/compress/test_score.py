"""Scores, against numpy on the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc.compress.config import WidthsConfig
from flabc.compress.score import SCORES, Heard
from flabc.recipe import Recipe


def heard(inputs: np.ndarray, down: np.ndarray) -> Heard:
    arrays = (down, np.square(inputs).sum(0), inputs.sum(0), inputs.T @ inputs)
    weight, square, total, gram = (torch.from_numpy(array).float() for array in arrays)
    return Heard(weight, square, total, len(inputs), gram=gram)


def root_mean_square(inputs: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(inputs).mean(axis=0))


def one_after_another(inputs: np.ndarray, down: np.ndarray, unit: int = 1) -> np.ndarray:
    """Drop the unit whose loss refitting mends best, again and again; what each adds to the error, never less."""
    ridge = 0.01 * np.square(inputs).sum(0).mean()
    rows = np.vstack([inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])  # damped least squares as a plain one
    wanted = rows @ down.T

    def error(units: list[int]) -> float:
        kept = rows[:, [unit * u + at for u in units for at in range(unit)]]
        found = kept @ np.linalg.lstsq(kept, wanted, rcond=None)[0] if units else 0 * wanted
        return float(np.square(wanted - found).sum() / len(inputs))

    left = list(range(inputs.shape[1] // unit))
    worth, spent, before = np.zeros(len(left)), 0.0, 0.0
    while left:
        errors = {u: error([other for other in left if other != u]) for u in left}
        going = min(errors, key=errors.__getitem__)
        spent = max(spent, errors[going] - before)
        before, worth[going] = errors[going], spent
        left.remove(going)
    return worth


REFERENCES = {
    "first_n": lambda inputs, down: np.arange(inputs.shape[1], 0, -1),
    "obs": one_after_another,
    "wifv": lambda inputs, down: (
        (inputs.var(axis=0, ddof=1) if len(inputs) > 1 else np.zeros(inputs.shape[1])) * np.square(down).sum(0)
    ),
    "magnitude": lambda inputs, down: np.linalg.norm(down, axis=0),
    "activation": lambda inputs, down: root_mean_square(inputs),
    "wanda": lambda inputs, down: root_mean_square(inputs) * np.linalg.norm(down, axis=0),
}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40))
def test_every_score_is_what_numpy_finds_on_the_activations(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, down = rng.normal(size=(tokens, 7)), rng.normal(size=(5, 7))
    assert set(REFERENCES) == set(SCORES)
    for name, score in SCORES.items():
        np.testing.assert_allclose(score.worth(heard(inputs, down)).numpy(), REFERENCES[name](inputs, down), 2e-3, 1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 40))
def test_the_scores_of_heads_are_those_of_their_inputs_together(seed: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, weight = rng.normal(size=(tokens, 12)), rng.normal(size=(5, 12))
    groups = replace(heard(inputs, weight), unit=3)
    for name, together in {
        "magnitude": np.linalg.norm,
        "activation": np.linalg.norm,
        "wanda": np.sum,
        "wifv": np.sum,
    }.items():
        expected = [together(each) for each in REFERENCES[name](inputs, weight).reshape(4, 3)]
        np.testing.assert_allclose(SCORES[name].worth(groups).numpy(), expected, 2e-3, 1e-5)
    np.testing.assert_allclose(SCORES["obs"].worth(groups).numpy(), one_after_another(inputs, weight, 3), 2e-3, 1e-5)
    assert SCORES["first_n"].worth(groups).tolist() == [4, 3, 2, 1]


def test_what_obs_keeps_stands_in_best_for_what_goes() -> None:
    """Also where several channels go between two updates of the inverse."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(600, 60)) @ rng.normal(size=(60, 192)) + 0.3 * rng.normal(size=(600, 192))
    weight = rng.normal(size=(20, 192))

    def error(score: str) -> float:
        kept = SCORES[score].worth(heard(inputs, weight)).topk(96).indices.numpy()
        found = inputs[:, kept] @ np.linalg.lstsq(inputs[:, kept], inputs @ weight.T, rcond=None)[0]
        return float(np.square(inputs @ weight.T - found).sum())

    assert all(error("obs") < 0.95 * error(other) for other in ("wanda", "activation", "wifv", "magnitude"))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), unit=st.sampled_from([1, 2, 4]), data=st.data())
def test_whoever_goes_does_not_change_with_how_many_are_ranked(seed: int, unit: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    inputs, weight = rng.normal(size=(400, 192)), rng.normal(size=(8, 192))
    known = replace(heard(inputs, weight), unit=unit)
    units = 192 // unit
    going = data.draw(st.integers(1, units - 1))
    whole, ranked = (SCORES["obs"].worth(each) for each in (known, replace(known, going=going)))
    assert set(ranked.topk(units - going).indices.tolist()) == set(whole.topk(units - going).indices.tolist())
    assert ranked.isfinite().sum() < going + units / 32  # the rest was not worked out


def test_scores_worked_out_by_hand() -> None:
    two_tokens = heard(np.array([[3.0, 0.0], [4.0, 1.0]]), np.array([[3.0, 0.0], [4.0, 2.0]]))
    assert two_tokens.mean_square.tolist() == [12.5, 0.5]
    assert SCORES["magnitude"].worth(two_tokens).tolist() == [5, 2]
    assert SCORES["activation"].worth(two_tokens).tolist() == pytest.approx([12.5**0.5, 0.5**0.5])
    assert SCORES["wanda"].worth(two_tokens).tolist() == pytest.approx([5 * 12.5**0.5, 2 * 0.5**0.5])


def test_editors_are_offered_every_registered_score() -> None:
    assert WidthsConfig.model_json_schema()["properties"]["score"]["enum"] == sorted(SCORES)
    assert Recipe.model_json_schema()["$defs"]["WidthsConfig"]["properties"]["score"]["enum"] == sorted(SCORES)
