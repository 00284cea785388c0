"""The layers stage, against models that transformers builds without the layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flabc.compress import checkpoint, layers
from flabc.compress.config import LayersConfig
from flabc.compress.model import CausalLM
from flabc.compress.stage import Context

MakeContext = Callable[..., Context]


def layers_config(**fields: Any) -> LayersConfig:
    return LayersConfig.model_validate(fields)


def with_layers(theirs: Any, keep: list[int]) -> Any:
    """The model with these layers only."""
    cut = copy.deepcopy(theirs)
    cut.model.layers = torch.nn.ModuleList(cut.model.layers[index] for index in keep)
    cut.config.num_hidden_layers = len(keep)
    return cut


@torch.no_grad()
def log_probs(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)


def kl_cost(theirs: Any, keep: list[int], tokens: Tensor) -> float:
    dense, cut = log_probs(theirs, tokens), log_probs(with_layers(theirs, keep), tokens)
    return float(functional.kl_div(cut, dense, log_target=True, reduction="none").sum(-1).mean())


def perplexity_cost(theirs: Any, keep: list[int], tokens: Tensor) -> float:
    return float(functional.nll_loss(log_probs(with_layers(theirs, keep), tokens), tokens[:, 1:].flatten()))


COSTS = {"kl": kl_cost, "perplexity": perplexity_cost}


def greedy(theirs: Any, count: int, cost: Callable[[list[int]], float]) -> tuple[list[int], list[tuple[int, float]]]:
    """Remove layers one after another by trying every model there is."""
    keep, removed = list(range(theirs.config.num_hidden_layers)), []
    for _ in range(count):
        costs = {layer: cost([other for other in keep if other != layer]) for layer in keep}
        worst = min(costs, key=costs.__getitem__)
        removed.append((worst, costs[worst]))
        keep.remove(worst)
    return keep, removed


@pytest.mark.parametrize("criterion", list(COSTS))
def test_the_choice_is_the_one_that_trying_all_makes(
    pair: tuple[CausalLM, Any], make_context: MakeContext, criterion: str
) -> None:
    ours, theirs = pair
    context = make_context(ours)
    tokens = context.tokens(ours)[:4]
    keep, removed = greedy(theirs, 2, lambda keep: COSTS[criterion](theirs, keep, tokens))
    made = layers.plan(ours, layers_config(count=2, criterion=criterion, sequences=4), context)
    assert list(made.keep) == keep
    for entry, (layer, cost) in zip(made.details["removed"], removed, strict=True):
        assert entry["layer"] == layer
        assert entry[criterion] == pytest.approx(cost, rel=1e-3, abs=1e-4)


def test_a_cut_model_saved_loads_with_transformers_as_the_model_without_the_layer(
    pair: tuple[CausalLM, Any], make_context: MakeContext, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ours, theirs = pair
    context = make_context(ours)
    made = layers.plan(ours, layers_config(count=1), context)
    cut = layers.apply(ours, made)
    checkpoint.write(cut, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="sdpa")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.num_parameters() == cut.spec.num_parameters
    tokens = context.tokens(ours)
    assert torch.equal(log_probs(loaded.eval(), tokens), log_probs(with_layers(theirs, list(made.keep)), tokens))


def layer_parameters(theirs: Any) -> int:
    return sum(parameter.numel() for parameter in theirs.model.layers[0].parameters())


@pytest.mark.parametrize(("may_go", "slack", "removed"), [(0, 0, 0), (1, -1, 0), (1, 0, 1), (2, -1, 1), (2, 100, 2)])
def test_no_more_goes_than_the_target_lets_go(
    one_pair: tuple[CausalLM, Any], make_context: MakeContext, may_go: int, slack: int, removed: int
) -> None:
    ours, theirs = one_pair
    spare, total = may_go * layer_parameters(theirs) + slack, theirs.num_parameters()
    context = make_context(ours, keep=(total - spare) / total)
    assert context.spare(ours) == spare
    made = layers.plan(ours, layers_config(count=3), context)
    assert 3 - len(made.keep) == removed
    assert layers.apply(ours, made).spec.num_parameters >= (context.target_parameters or 0)


def test_one_layer_always_stays(tied: CausalLM, make_context: MakeContext) -> None:
    made = layers.plan(tied, layers_config(count=99), make_context(tied))
    assert len(made.keep) == 1
    assert made.summary.startswith("layers: remove 2 of 3 layers (")


@pytest.mark.parametrize(("fraction", "removed"), [(0.34, 1), (0.6, 2), (0.1, 0)])
def test_a_fraction_is_rounded_to_whole_layers(
    tied: CausalLM, make_context: MakeContext, fraction: float, removed: int
) -> None:
    made = layers.plan(tied, layers_config(fraction=fraction), make_context(tied))
    assert 3 - len(made.keep) == removed
    assert len(made.details["removed"]) == removed


def test_the_order_of_the_layers_that_stay_is_theirs(one_pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = one_pair
    cut = layers.apply(ours, layers.LayersPlan("", {}, (0, 2)))
    state = theirs.state_dict()
    assert set(cut.weights) == set(cut.spec.shapes())
    for new, old in enumerate((0, 2)):
        for name, tensor in cut.layer_weights(new).items():
            assert torch.equal(tensor, state[f"model.layers.{old}.{name}"])


def test_costs_grow_as_more_is_removed(one_pair: tuple[CausalLM, Any], make_context: MakeContext) -> None:
    ours, _ = one_pair
    made = layers.plan(ours, layers_config(count=2), make_context(ours))
    costs = [entry["kl"] for entry in made.details["removed"]]
    assert all(first < second for first, second in pairwise(costs))
    assert f"{costs[-1]:.4f}" in made.summary


@pytest.mark.parametrize("fields", [{}, {"count": 1, "fraction": 0.5}])
def test_a_recipe_says_one_amount(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of"):
        layers_config(**fields)
