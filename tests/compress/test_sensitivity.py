"""What narrowing costs: one walk over all places and widths against models that were really cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flabc.compress import load, sensitivity, units, widths
from flabc.compress.config import WidthsConfig
from flabc.compress.model import CausalLM
from flabc.compress.stage import Context
from flabc.compress.walk import Walk, dense_variant

MakeContext = Callable[..., Context]


def config_of(**fields: object) -> WidthsConfig:
    return WidthsConfig.model_validate({"allocation": "kl", "multiple_of": 1, "sequences": 3, **fields})


def log_probs(model: CausalLM, tokens: Tensor) -> Tensor:
    walk, variant = Walk(model, tokens, torch.device("cpu"), torch.float32), dense_variant(model.spec)
    return torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])


@pytest.mark.parametrize("name", ["qwen2-tied", "phi3-untied", "starcoder2-tied", "gemma2-tied"])
def test_the_costs_are_those_of_models_that_were_cut_there(
    tiny: Callable[[str], Path], make_context: MakeContext, name: str
) -> None:
    model = load.load(str(tiny(name)))
    context = make_context(model)
    tokens, worth = context.tokens(model), dict[widths.Place, Tensor]()
    config = config_of(of=("ffn", "heads"))
    found = sensitivity.curves(model, config, context, tokens, worth)
    groups = model.spec.layers[0].num_key_value_heads
    assert set(found) == {(kind, layer) for kind in ("ffn", "heads") for layer in range(3)}
    assert [gone for gone, _ in found["ffn", 0]] == [10, 20, 40, 60]
    dense = log_probs(model, tokens[:3])
    for kind, layer, at in (("ffn", 0, 1), ("ffn", 2, 3), ("heads", 1, 0)):
        gone, cost = found[kind, layer][at]  # type: ignore[index]
        units = 80 if kind == "ffn" else groups
        rates = tuple(gone / units if index == layer else 0.0 for index in range(3))
        one = WidthsConfig.model_validate({"of": (kind,), "rates": {kind: rates}, "multiple_of": 1, "bias": "none"})
        said = log_probs(widths.apply(model, widths.plan(model, one, context)), tokens[:3])
        brute = float((dense.exp() * (dense - said)).sum(-1).mean())
        assert brute > 0
        assert cost == pytest.approx(brute, rel=1e-3, abs=1e-6)


def test_layers_that_matter_little_lose_most(tied: CausalLM, make_context: MakeContext) -> None:
    """One FFN gives a hundredth of what it gave: within its layer every error is as large as before."""
    name = tied.name("down", 1)
    quiet = replace(tied, weights={**tied.weights, name: tied.weights[name] * 0.01})
    context = make_context(quiet, keep=0.88)
    left = widths.apply(quiet, widths.plan(quiet, config_of(), context)).spec.layers
    assert left[1].intermediate_size < 30
    assert left[1].intermediate_size < min(left[0].intermediate_size, left[2].intermediate_size) / 2
    errors = widths.plan(quiet, config_of(allocation="uniform"), context).details["ffn"]["relative_output_error"]
    assert max(errors.values()) < 2 * min(errors.values())  # within its layer nothing tells


def test_inputs_are_multiplied_once_unless_a_refit_wants_them_again(
    tied: CausalLM, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = list[int](), units.Gram

    def counted(size: int, device: torch.device) -> units.Gram:
        made.append(size)
        return plain(size, device)

    monkeypatch.setattr(units, "Gram", counted)
    context = make_context(tied, keep=0.88)
    unrestored = widths.plan(tied, config_of(restore=False), context)
    assert made == [80] * 3
    restored = widths.plan(tied, config_of(restore=True), context)
    assert len(made) == 3 + 3 + len(restored.keep)
    assert unrestored.keep == restored.keep
    assert not unrestored.details["ffn"]["relative_output_error"]  # not known, and not said to be nought


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(8, 60),
    seed=st.integers(0, 1000),
    costs=st.lists(st.floats(0, 2), min_size=3, max_size=3),
)
def test_worth_follows_the_order_of_the_scores_and_never_falls(units: int, seed: int, costs: list[float]) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(units).astype(np.float32))
    gone = sorted({max(1, units // 4), units // 2, 3 * units // 4})
    worth = sensitivity.marginal_worth(scores, list(zip(gone, costs, strict=False)))
    assert worth.dtype == torch.float64
    assert torch.equal(worth.argsort(), scores.argsort())
    assert bool((worth >= 0).all())


def test_worth_adds_up_to_the_costs_where_they_are_those_of_a_square() -> None:
    curve = [(gone, 1e-4 * gone**2) for gone in (10, 20, 40, 60)]
    worth = sensitivity.marginal_worth(torch.arange(80.0), curve)
    for gone, cost in curve:
        assert float(worth[:gone].sum()) == pytest.approx(cost, rel=0.02)


def test_a_place_without_levels_loses_nothing() -> None:
    assert torch.isinf(sensitivity.marginal_worth(torch.ones(1), [])).all()
