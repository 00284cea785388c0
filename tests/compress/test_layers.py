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

from .conftest import received

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


def residuals(theirs: Any, tokens: Tensor) -> list[Tensor]:
    """The stream before each layer and after the last, without the final norm."""
    return received(theirs, [*theirs.model.layers, theirs.model.norm], tokens)


def turn(before: Tensor, after: Tensor) -> float:
    return float(1 - functional.cosine_similarity(before, after, dim=-1).mean())


@pytest.mark.parametrize("criterion", ["bi", "last_token_cosine"])
@pytest.mark.parametrize("order", ["greedy", "one_shot"])
def test_layers_that_turn_the_stream_least_go_first(
    pair: tuple[CausalLM, Any], make_context: MakeContext, criterion: str, order: str
) -> None:
    ours, theirs = pair
    context = make_context(ours)
    at = slice(None) if criterion == "bi" else slice(-1, None)
    keep, removed = list(range(theirs.config.num_hidden_layers)), []
    for step in range(2):
        if step == 0 or order == "greedy":
            stream = residuals(with_layers(theirs, keep), context.tokens(ours)[:4])
            costs = {layer: turn(b[:, at], a[:, at]) for layer, (b, a) in zip(keep, pairwise(stream), strict=True)}
        removed.append(min((layer for layer in keep), key=costs.__getitem__))
        keep.remove(removed[-1])
    made = layers.plan(ours, layers_config(count=2, criterion=criterion, order=order, sequences=4), context)
    assert [entry["layer"] for entry in made.details["removed"]] == removed
    assert made.details["removed"][-1][criterion] == pytest.approx(costs[removed[-1]], rel=1e-3, abs=1e-5)


def test_a_run_of_layers_is_the_one_that_turns_the_stream_least(
    pair: tuple[CausalLM, Any], make_context: MakeContext
) -> None:
    ours, theirs = pair
    context = make_context(ours)
    stream = [state[:, -1] for state in residuals(theirs, context.tokens(ours)[:4])]
    angles = [functional.cosine_similarity(stream[at], stream[at + 2], dim=-1).arccos().mean() for at in range(2)]
    config = layers_config(count=2, criterion="angular", order="consecutive", sequences=4)
    made = layers.plan(ours, config, context)
    first = angles.index(min(angles))
    assert made.keep == tuple(layer for layer in range(3) if layer not in (first, first + 1))
    assert made.details["removed"][0]["angular"] == pytest.approx(float(min(angles)) / torch.pi, rel=1e-3)


def test_the_turn_of_a_sub_block_is_that_of_its_own_residual(
    one_pair: tuple[CausalLM, Any], make_context: MakeContext
) -> None:
    ours, theirs = one_pair
    context = make_context(ours)
    tokens = context.tokens(ours)[:4]
    between = received(theirs, [layer.post_attention_layernorm for layer in theirs.model.layers], tokens)
    stream = residuals(theirs, tokens)
    costs = {(layer, "attention"): turn(stream[layer], between[layer]) for layer in range(3)}
    costs |= {(layer, "ffn"): turn(between[layer], stream[layer + 1]) for layer in range(3)}
    config = layers_config(count=1, criterion="bi", parts="sub_blocks", sequences=4)
    (entry,) = layers.plan(ours, config, context).details["removed"]
    assert (entry["layer"], entry["part"]) == min(costs, key=costs.__getitem__)
    assert entry["bi"] == pytest.approx(min(costs.values()), rel=1e-3)


def test_without_an_amount_the_target_says_how_many_go(
    one_pair: tuple[CausalLM, Any], make_context: MakeContext
) -> None:
    ours, theirs = one_pair
    spare, total = 2 * layer_parameters(theirs) + 5, theirs.num_parameters()
    context = make_context(ours, keep=(total - spare) / total)
    assert len(layers.plan(ours, layers_config(), context).keep) == 1


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


def test_a_recipe_says_one_amount() -> None:
    with pytest.raises(ValueError, match="at most one of"):
        layers_config(count=1, fraction=0.5)


def test_a_run_is_of_one_kind_of_part() -> None:
    with pytest.raises(ValueError, match="does not go with"):
        layers_config(order="consecutive", parts="sub_blocks")
