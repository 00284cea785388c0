"""Scores of FFN channels, against numpy on the activations themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc.compress.config import FFNConfig
from flabc.compress.score import SCORES, Heard
from flabc.recipe import Recipe


def heard(inputs: np.ndarray, down: np.ndarray) -> Heard:
    sums = (torch.from_numpy(array).float() for array in (inputs.T @ inputs, inputs.sum(0)))
    return Heard(torch.from_numpy(down).float(), *sums, len(inputs))


def root_mean_square(inputs: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(inputs).mean(axis=0))


def error_after_refit(inputs: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Drop each channel in turn, refit the others by least squares, and look at what is missing."""
    ridge = 0.01 * np.square(inputs).sum(0).mean()
    rows = np.vstack([inputs, np.sqrt(ridge) * np.eye(inputs.shape[1])])  # damped least squares as a plain one
    wanted = rows @ down.T
    errors = []
    for channel in range(inputs.shape[1]):
        others = np.delete(rows, channel, axis=1)
        found = others @ np.linalg.lstsq(others, wanted, rcond=None)[0]
        errors.append(np.square(wanted - found).sum() / len(inputs))
    return np.array(errors)


REFERENCES = {
    "first_n": lambda inputs, down: np.arange(inputs.shape[1], 0, -1),
    "obs": error_after_refit,
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
        np.testing.assert_allclose(score(heard(inputs, down)).numpy(), REFERENCES[name](inputs, down), 2e-3, 1e-5)


def test_scores_worked_out_by_hand() -> None:
    two_tokens = heard(np.array([[3.0, 0.0], [4.0, 1.0]]), np.array([[3.0, 0.0], [4.0, 2.0]]))
    assert two_tokens.mean_square.tolist() == [12.5, 0.5]
    assert SCORES["magnitude"](two_tokens).tolist() == [5, 2]
    assert SCORES["activation"](two_tokens).tolist() == pytest.approx([12.5**0.5, 0.5**0.5])
    assert SCORES["wanda"](two_tokens).tolist() == pytest.approx([5 * 12.5**0.5, 2 * 0.5**0.5])


def test_editors_are_offered_every_registered_score() -> None:
    assert FFNConfig.model_json_schema()["properties"]["score"]["enum"] == sorted(SCORES)
    assert Recipe.model_json_schema()["$defs"]["FFNConfig"]["properties"]["score"]["enum"] == sorted(SCORES)
