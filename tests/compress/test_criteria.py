"""Criteria, against torch's own losses and numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from flabc.compress.config import LayersConfig, WidthsConfig
from flabc.compress.criteria import CRITERIA, Readout, Readouts, angular, bi, kl, last_token_cosine, perplexity
from flabc.errors import FlabcError
from flabc.recipe import Recipe, load


def readout(seed: int, scale: float = 3.0) -> Readout:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(20, 50, generator=generator)
    targets = torch.randint(0, 50, (20,), generator=torch.Generator().manual_seed(0))
    return Readout(logits.log_softmax(-1), targets)


def by_hand(*probabilities: float, target: int = 0) -> Readout:
    return Readout(torch.tensor([probabilities]).log(), torch.tensor([target]))


@settings(max_examples=30, deadline=None)
@given(first=st.integers(0, 10_000), second=st.integers(0, 10_000), scale=st.floats(0.1, 20))
def test_kl_is_torchs_kl(first: int, second: int, scale: float) -> None:
    dense, variant = readout(first, scale), readout(second)
    expected = functional.kl_div(variant.log_probs, dense.log_probs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(kl(dense, variant), expected, rtol=1e-4, atol=1e-5)


def test_kl_goes_from_the_dense_model_to_the_variant() -> None:
    dense, variant = by_hand(0.5, 0.5), by_hand(0.9, 0.1)
    assert float(kl(dense, variant)) == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert float(kl(variant, dense)) == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))
    assert float(kl(dense, dense)) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_perplexity_is_torchs_cross_entropy(seed: int) -> None:
    variant = readout(seed)
    expected = functional.cross_entropy(variant.log_probs, variant.targets, reduction="none")
    torch.testing.assert_close(perplexity(readout(1), variant), expected)


def test_perplexity_is_the_surprise_at_what_came_next() -> None:
    assert float(perplexity(by_hand(0.5, 0.5), by_hand(0.2, 0.8, target=1))) == pytest.approx(-math.log(0.8))


def test_every_criterion_costs_each_token_alone() -> None:
    dense, variant = readout(1), readout(2)
    for criterion in (each.cost for each in CRITERIA.values() if isinstance(each, Readouts)):
        whole = criterion(dense, variant)
        assert whole.shape == (20,)
        last = (Readout(each.log_probs[-1:], each.targets[-1:]) for each in (dense, variant))
        torch.testing.assert_close(criterion(*last), whole[-1:])


def test_the_streams_criteria_are_cosines_and_angles() -> None:
    before = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    after = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])  # no turn, and an eighth
    assert bi(before, after).flatten().tolist() == pytest.approx([0, 1 - math.sqrt(0.5)], abs=1e-6)
    assert float(last_token_cosine(before, after)) == pytest.approx(1 - math.sqrt(0.5))
    assert float(angular(before, after)) == pytest.approx(0.25)
    assert float(angular(before, -before)) == pytest.approx(1)


def choices(config: Any, field: str) -> list[str]:
    return cast(list[str], config.model_json_schema()["properties"][field]["enum"])


def test_editors_are_offered_every_registered_criterion() -> None:
    assert choices(LayersConfig, "criterion") == sorted(CRITERIA)
    assert sorted(CRITERIA) == Recipe.model_json_schema()["$defs"]["LayersConfig"]["properties"]["criterion"]["enum"]


def test_a_misspelt_criterion_is_answered_with_the_nearest(tmp_path: Any) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\nstages:\n- {stage: layers, count: 1, criterion: perplexty}\n")
    with pytest.raises(FlabcError, match="Did you mean 'perplexity'"):
        load(file)


def test_a_misspelt_field_is_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        WidthsConfig.model_validate({"ratio": 0.5})
