"""Ridge regression with a damping that is chosen, beside scikit-learn's with one that is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as Sklearn

from flabc.compress.ridge import DAMPINGS, Fit, Ridge, parts

CPU = torch.device("cpu")


def data(tokens: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of very different sizes that are not centred, (tokens, 6), and outputs, (tokens, 4)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 1, size=(tokens, 6)) * [0.1, 0.3, 1, 1, 3, 10]
    return x, x @ rng.normal(size=(6, 4)) + 2 + noise * rng.normal(size=(tokens, 4))


def fitted(
    x: np.ndarray, y: np.ndarray, damping: float | None, scale: np.ndarray | None = None, *, intercept: bool = False
) -> Fit:
    ridge = Ridge(x.shape[1], y.shape[1], CPU, intercept=intercept)
    tensors = [torch.from_numpy(each).float() for each in (x, y)]
    factor = None if scale is None else torch.from_numpy(scale).float()
    for at, aside in parts(8, len(x) // 8):
        ridge.add(tensors[0][at], tensors[1][at], None if factor is None else factor[at], aside=aside)
    return ridge.fit(damping)


def by_sklearn(
    x: np.ndarray, y: np.ndarray, damping: float, weights: np.ndarray | None = None, *, intercept: bool = False
) -> Sklearn:
    """On inputs of one size a damping is the same for all."""
    share = np.ones(len(x)) if weights is None else weights
    mean = np.average(x, axis=0, weights=share) if intercept else 0
    size = np.sqrt((share[:, None] * (x - mean) ** 2).sum(0))
    model = Sklearn(alpha=damping, fit_intercept=intercept).fit(x / size, y, sample_weight=weights)
    model.coef_ /= size
    return model


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_given_damping_is_sklearns_on_inputs_of_one_size(intercept: bool, scaled: bool) -> None:
    x, y = data(800, 1.0)
    scale = 2.0 ** np.random.default_rng(1).integers(-2, 3, size=(800, 1)) if scaled else None
    expected = by_sklearn(x, y, 0.3, None if scale is None else scale[:, 0] ** 2, intercept=intercept)
    found = fitted(x, y, 0.3, scale, intercept=intercept)
    np.testing.assert_allclose(found.change, expected.coef_, rtol=2e-3, atol=1e-3)
    np.testing.assert_allclose(found.shift, expected.intercept_ if intercept else 0, rtol=2e-3, atol=1e-3)
    assert found.damping == 0.3


@pytest.mark.parametrize("noise", [0.01, 3.0, 30.0])
def test_the_damping_chosen_is_the_one_that_explains_best_what_was_put_aside(noise: float) -> None:
    x, y = data(160, noise)
    aside = np.concatenate([np.full(at.stop - at.start, put) for at, put in parts(8, 20)])
    errors = [np.square(y[aside] - by_sklearn(x[~aside], y[~aside], each).predict(x[aside])).sum() for each in DAMPINGS]
    found = fitted(x, y, None)
    assert found.damping is not None
    assert errors[DAMPINGS.index(found.damping)] < 1.02 * min(errors)  # all outputs there, mixtures of them here
    assert max(errors) > 1.05 * min(errors)
    np.testing.assert_allclose(found.change, by_sklearn(x, y, found.damping).coef_, rtol=5e-3, atol=5e-3)


def test_noisier_outputs_are_damped_more() -> None:
    chosen = [fitted(*data(160, noise), None).damping or np.inf for noise in (0.01, 3.0, 300.0)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_what_explains_nothing_of_what_was_put_aside_changes_nothing() -> None:
    x, y = data(64, 0.0)
    for at, aside in parts(8, 8):
        y[at] *= -1 if aside else 1
    found = fitted(x, y, None, intercept=True)
    assert found.damping is None
    assert not found.change.any()
    assert not found.shift.any()


def test_an_input_that_is_always_nought_is_left_alone() -> None:
    x, y = data(160, 1.0)
    x[:, 2] = 0
    assert not fitted(x, y, None).change[:, 2].any()


@pytest.mark.parametrize("constant", [0.0, 0.1, 50.3])
@pytest.mark.parametrize("columns", [1, 64])
@pytest.mark.parametrize("scaled", [False, True])
def test_inputs_that_never_vary_do_not_make_it_singular(constant: float, columns: int, scaled: bool) -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(4096, 64))
    y = x @ rng.normal(size=(64, 3)) + 20
    x[:, :columns] = constant
    scale = 2.0 ** rng.integers(-2, 3, size=(4096, 1)) if scaled else None
    for intercept in (False, True):
        found = fitted(x, y, None, scale, intercept=intercept)
        assert found.change.isfinite().all()
        assert found.changes == (columns == 1 or constant != 0 or intercept)


def test_inputs_far_from_nought_do_not_make_it_singular() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(3000, 1, size=(4096, 64))
    assert fitted(x, rng.normal(size=(4096, 3)), 0.01, intercept=True).change.isfinite().all()


@pytest.mark.parametrize("corpora", [1, 2, 3, 4])
@pytest.mark.parametrize("openings", [1, 2])
def test_of_every_corpus_opening_and_beginning_texts_are_fitted_and_put_aside(corpora: int, openings: int) -> None:
    turns = np.array([(at % corpora, at // corpora % openings, at // corpora // openings % 2) for at in range(128)])
    sides: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for at, aside in parts(128, 1):
        sides[aside].append(turns[at])
    for of in range(3):
        fitted, aside = (np.concatenate(sides[side])[:, of].tolist() for side in (False, True))
        assert set(fitted) == set(aside) == set(turns[:, of].tolist())


@given(texts=st.integers(1, 40), length=st.integers(4, 50), more=st.integers(0, 9))
def test_every_token_has_its_part_and_some_are_put_aside(texts: int, length: int, more: int) -> None:
    found = list(parts(texts, length, more))
    tokens = [token for at, _ in found for token in range(at.start, at.stop)]
    assert tokens == list(range(texts * length + more))
    aside = [token for at, put in found if put for token in range(at.start, at.stop)]
    assert len(aside) == texts // 4 * length if texts >= 4 else 0 < len(aside) <= texts * length / 2
