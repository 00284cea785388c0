"""The widths stage and the refit, against transformers' hooks and numpy's least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flabc.compress import checkpoint, load, units, widths
from flabc.compress.config import WidthsConfig
from flabc.compress.model import CausalLM, cut_channels, cut_layers, cut_sub_blocks
from flabc.compress.restore import DAMPING, refit
from flabc.compress.score import Heard
from flabc.compress.stage import Context
from flabc.compress.stored import loaded
from flabc.compress.walk import Walk, dense_variant
from flabc.errors import StageError

from .conftest import read, received

MakeContext = Callable[..., Context]

#: Which channels of each tiny layer stay in the tests of the cut itself: the same number, different ones.
KEEP = {layer: [channel for channel in range(80) if channel % 5 != layer] for layer in range(3)}


def config_of(**fields: Any) -> WidthsConfig:
    return WidthsConfig.model_validate({"multiple_of": 8, **fields})


def kept(made: widths.WidthsPlan, kind: str = "ffn") -> dict[int, tuple[int, ...]]:
    return {layer: units for (of, layer), units in made.keep.items() if of == kind}


def heard_by(model: CausalLM, context: Context, kind: str) -> dict[int, Heard]:
    heard: dict[int, Heard] = {}
    units.listen(model, (kind,), context.tokens(model), context, lambda place, found: heard.update({place[1]: found}))
    return heard


@torch.no_grad()
def logits(theirs: Any, tokens: Tensor) -> Tensor:
    return theirs(tokens, use_cache=False).logits


@torch.no_grad()
def zeroed(theirs: Any, keep: Mapping[int, Sequence[int]], down: Mapping[int, Tensor] | None = None) -> Any:
    """The model with nothing going in or out of the other channels, biases included; ``down`` replaces weights."""
    cut = copy.deepcopy(theirs)
    for layer, kept in keep.items():
        mlp = cut.model.layers[layer].mlp
        lost = sorted(set(range(mlp.down_proj.in_features)) - set(kept))
        mlp.down_proj.weight[:, lost] = 0
        for projection in (mlp.gate_proj, mlp.up_proj):
            for parameter in projection.parameters():
                parameter[lost] = 0
        if down:
            mlp.down_proj.weight[:, list(kept)] = down[layer]
    return cut


def saved(model: CausalLM, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    checkpoint.write(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()


def projection_inputs(theirs: Any, tokens: Tensor, role: str = "mlp.down_proj") -> list[Tensor]:
    """What transformers sends into each layer's projection, (tokens, F)."""
    modules = [layer.get_submodule(role) for layer in theirs.model.layers]
    return [inputs.flatten(0, 1) for inputs in received(theirs, modules, tokens)]


def test_a_cut_model_is_the_dense_model_with_the_channels_zeroed(pair: tuple[CausalLM, Any], tmp_path: Path) -> None:
    ours, theirs = pair
    tokens = torch.randint(0, 700, (3, 40), generator=torch.Generator().manual_seed(2))
    loaded = saved(cut_channels(ours, KEEP), tmp_path)
    assert loaded.config.intermediate_size == 64
    torch.testing.assert_close(logits(loaded, tokens), logits(zeroed(theirs, KEEP), tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(loaded, tokens), logits(theirs, tokens), atol=1e-2)


def test_every_tensor_of_a_channel_is_cut_biases_too(untied: CausalLM) -> None:
    cut = cut_channels(untied, {1: [5, 7, 11]})
    assert set(cut.weights) == set(untied.weights)
    for name, shape in cut.spec.shapes().items():
        assert tuple(cut.weights[name].shape) == shape
    before, after = untied.layer_weights(1), cut.layer_weights(1)
    for part in ("gate_proj.weight", "gate_proj.bias", "up_proj.weight", "up_proj.bias"):
        assert torch.equal(after[f"mlp.{part}"], before[f"mlp.{part}"][[5, 7, 11]])
    assert torch.equal(after["mlp.down_proj.weight"], before["mlp.down_proj.weight"][:, [5, 7, 11]])
    assert torch.equal(after["mlp.down_proj.bias"], before["mlp.down_proj.bias"])
    assert torch.equal(
        cut.weights["model.layers.0.mlp.up_proj.bias"], untied.weights["model.layers.0.mlp.up_proj.bias"]
    )


@pytest.mark.parametrize("first_tokens", [0.0, 1 / 3])
def test_what_is_heard_is_what_transformers_hooks_hear(
    pair: tuple[CausalLM, Any], make_context: MakeContext, first_tokens: float
) -> None:
    ours, theirs = pair
    context = make_context(ours, first_tokens=first_tokens)
    heard = heard_by(ours, context, "ffn")
    inputs = projection_inputs(theirs, context.tokens(ours))
    firsts = context.firsts(ours, context.tokens(ours))
    if firsts is not None:
        alone = projection_inputs(theirs, firsts.view(-1, 1))
        inputs = [torch.cat(both) for both in zip(inputs, alone, strict=True)]
    assert sorted(heard) == list(range(len(inputs)))
    for layer, x in enumerate(inputs):
        assert heard[layer].tokens == len(x) == round(6 * (1 + first_tokens)) * 48
        torch.testing.assert_close(heard[layer].gram, x.T @ x, rtol=1e-3, atol=1e-3 * float(x.square().sum(0).max()))
        torch.testing.assert_close(heard[layer].mean_square, x.square().mean(0), rtol=1e-3, atol=1e-6)
        assert torch.equal(heard[layer].weight, theirs.model.layers[layer].mlp.down_proj.weight)


@pytest.mark.parametrize(("score", "restore"), [("obs", False), ("wanda", True)])
def test_the_plan_tells_the_error_it_makes_and_applies_as_it_says(
    pair: tuple[CausalLM, Any], make_context: MakeContext, tmp_path: Path, score: str, restore: bool
) -> None:
    ours, theirs = pair
    context = make_context(ours)
    made = widths.plan(ours, config_of(rate=0.5, score=score, restore=restore), context)
    down = {
        layer: theirs.model.layers[layer].mlp.down_proj.weight.detach()[:, list(k)] for layer, k in kept(made).items()
    }
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in down]
    down |= {at: made.refitted[f"{name}.weight"] for at, name in enumerate(names) if restore}
    biased = f"{names[0]}.bias" in ours.weights
    wanted = {f"{name}.{what}" for name in names for what in ("weight",) * restore + ("bias",) * biased}
    assert set(made.refitted) == wanted
    tokens = context.tokens(ours)
    for layer, x in enumerate(projection_inputs(theirs, tokens)):
        dense = x @ theirs.model.layers[layer].mlp.down_proj.weight.T
        gap = dense - x[:, list(kept(made)[layer])] @ down[layer].T
        if biased:
            bias = theirs.model.layers[layer].mlp.down_proj.bias
            gap -= made.refitted[f"{names[layer]}.bias"] - bias
            assert float(gap.detach().mean(0).abs().max()) < 1e-5  # a bias takes the mean, whatever else is done
            with torch.no_grad():
                bias.copy_(made.refitted[f"{names[layer]}.bias"])
        error = float((gap.square().sum() / dense.square().sum()).detach())
        assert made.details["ffn"]["relative_output_error"][str(layer)] == pytest.approx(error, rel=1e-2, abs=2e-5)
    loaded = saved(widths.apply(ours, made), tmp_path)
    expected = logits(zeroed(theirs, kept(made), down), tokens)
    torch.testing.assert_close(logits(loaded, tokens), expected, atol=1e-4, rtol=1e-4)


def test_refitting_lowers_the_error_of_every_layer(pair: tuple[CausalLM, Any], make_context: MakeContext) -> None:
    ours, _ = pair
    context = make_context(ours)
    plain, refitted = (widths.plan(ours, config_of(rate=0.5, restore=restore), context) for restore in (False, True))
    assert plain.keep == refitted.keep
    errors = (made.details["ffn"]["relative_output_error"].values() for made in (plain, refitted))
    assert all(after < 0.95 * before for before, after in zip(*errors, strict=True))


@pytest.mark.parametrize("score", ["activation", "magnitude", "wanda"])
def test_the_channels_worth_most_stay(one_pair: tuple[CausalLM, Any], make_context: MakeContext, score: str) -> None:
    ours, theirs = one_pair
    context = make_context(ours)
    made = widths.plan(ours, config_of(rate=0.25, score=score), context)
    for layer, x in enumerate(projection_inputs(theirs, context.tokens(ours))):
        weight = theirs.model.layers[layer].mlp.down_proj.weight.detach()
        worth = {"activation": x.norm(dim=0), "magnitude": weight.norm(dim=0)}
        worth["wanda"] = worth["activation"] * worth["magnitude"]
        assert list(kept(made)[layer]) == sorted(np.argsort(-worth[score].numpy())[:56].tolist())


def problem(seed: int, tokens: int = 200) -> tuple[np.ndarray, np.ndarray, Tensor, Tensor]:
    """Correlated inputs X, a projection W, and both as the refit wants them: W and the Gram matrix."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(tokens, 12)) @ rng.normal(size=(12, 12))
    weight = rng.normal(size=(5, 12))
    return inputs, weight, torch.from_numpy(weight), torch.from_numpy(inputs.T @ inputs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sets(st.integers(0, 11), min_size=1).map(sorted))
def test_undamped_the_refit_is_least_squares(seed: int, keep: list[int]) -> None:
    inputs, weight, w, gram = problem(seed)
    expected = np.linalg.lstsq(inputs[:, keep], inputs @ weight.T, rcond=None)[0].T
    found = refit(w, gram, torch.tensor(keep), damping=1e-12).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.sets(st.integers(0, 11), min_size=1).map(sorted),
    damping=st.floats(1e-4, 10),
)
def test_damped_the_refit_is_least_squares_that_stays_near(seed: int, keep: list[int], damping: float) -> None:
    """Ridge regression towards the old weights is least squares on the inputs with a scaled identity below them."""
    inputs, weight, w, gram = problem(seed)
    ridge = damping * np.square(inputs[:, keep]).sum(axis=0).mean()
    stacked = np.vstack([inputs[:, keep], np.sqrt(ridge) * np.eye(len(keep))])
    wanted = np.vstack([inputs @ weight.T, np.sqrt(ridge) * weight[:, keep].T])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(refit(w, gram, torch.tensor(keep), damping).numpy(), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sets(st.integers(0, 11), min_size=1, max_size=11).map(sorted))
def test_the_refit_never_makes_the_output_worse(seed: int, keep: list[int]) -> None:
    inputs, weight, w, gram = problem(seed)
    kept = torch.tensor(keep)
    new = refit(w, gram, kept)
    before = np.square(inputs @ weight.T - inputs[:, keep] @ weight[:, keep].T).sum()
    after = np.square(inputs @ weight.T - inputs[:, keep] @ new.numpy().T).sum()
    assert after <= before * (1 + 1e-5)
    heard = Heard(w.double(), gram.diagonal(), torch.from_numpy(inputs.sum(0)), len(inputs), gram=gram.clone())
    told = units.cut_projection(heard, kept, restore=True, bias=False)
    assert torch.equal(told.weight.float(), new)
    assert told.error == pytest.approx(after / np.square(inputs @ weight.T).sum(), rel=1e-4, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keep=st.sets(st.integers(0, 11), min_size=1, max_size=11).map(sorted),
    restore=st.booleans(),
)
def test_a_bias_is_flaps_mean_or_the_intercept_of_least_squares(seed: int, keep: list[int], restore: bool) -> None:
    inputs, weight, w, _ = problem(seed)
    inputs = inputs + np.arange(12) / 3
    gram = torch.from_numpy(inputs.T @ inputs)
    heard = Heard(w.double(), gram.diagonal().clone(), torch.from_numpy(inputs.sum(0)), len(inputs), gram=gram)
    cut = units.cut_projection(heard, torch.tensor(keep), restore=restore, bias=True)
    dense, gone = inputs @ weight.T, [at for at in range(12) if at not in keep]
    left = dense - inputs[:, keep] @ cut.weight.double().numpy().T - cut.shift.double().numpy()
    assert cut.error == pytest.approx(np.square(left).sum() / np.square(dense).sum(), rel=1e-3, abs=1e-6)
    np.testing.assert_allclose(left.mean(0), 0, atol=1e-4)
    if not restore:  # FLAP's compensation: what the removed inputs give on average
        np.testing.assert_allclose(cut.shift, inputs[:, gone].mean(0) @ weight[:, gone].T, atol=1e-4)
    else:  # the least of error and damping: no more than what a refit without a bias has of both
        plain = refit(w, torch.from_numpy(inputs.T @ inputs), torch.tensor(keep)).double().numpy()
        error = np.square(dense - inputs[:, keep] @ plain.T).sum()
        damping = DAMPING * np.square(inputs - inputs.mean(0))[:, keep].sum(0).mean()
        assert np.square(left).sum() <= (error + damping * np.square(plain - weight[:, keep]).sum()) * (1 + 1e-4) + 1e-6


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize(("of", "role"), [("ffn", "mlp.down_proj"), ("heads", "self_attn.o_proj")])
def test_biases_are_added_where_the_family_has_a_flag_for_them(
    tiny: Callable[[str], Path], make_context: MakeContext, tmp_path: Path, of: str, role: str, restore: bool
) -> None:
    """A plain Llama comes out, whose first cut projection gives on average what the dense one gives."""
    ours, theirs = read(tiny("llama-tied"))
    context = make_context(ours)
    made = widths.plan(ours, config_of(of=(of,), rate=0.5, score="wanda", restore=restore, bias="add"), context)
    cut = widths.apply(ours, made)
    assert cut.spec.flags == {"attention_bias": of == "heads", "mlp_bias": of == "ffn"}
    found = saved(cut, tmp_path)
    assert type(found).__name__ == "LlamaForCausalLM"
    assert found.num_parameters() == cut.spec.num_parameters
    means = []
    for model in (found, theirs):
        projection = model.model.layers[0].get_submodule(role)
        (inputs,) = received(model, [projection], context.tokens(ours))
        means.append(projection(inputs).flatten(0, 1).mean(0))
    torch.testing.assert_close(means[0], means[1], atol=1e-5, rtol=1e-3)
    assert found.model.layers[0].get_submodule(role).bias.abs().max() > 0


def test_biases_that_are_added_count_towards_the_target(tiny: Callable[[str], Path], make_context: MakeContext) -> None:
    ours = load.load(str(tiny("llama-tied")))
    context = make_context(ours, keep=0.85)
    cut = widths.apply(ours, widths.plan(ours, config_of(multiple_of=1, bias="add"), context))
    assert context.target_parameters is not None
    per_channel = len(ours.spec.layers) * (3 * ours.spec.hidden_size + 2)
    assert context.target_parameters - per_channel < cut.spec.num_parameters <= context.target_parameters


@pytest.mark.parametrize("of", [("ffn",), ("heads",)])
def test_no_bias_is_added_where_the_family_knows_none(
    tied: CausalLM, make_context: MakeContext, of: tuple[str, ...]
) -> None:
    made = widths.plan(tied, config_of(of=of, rate=0.5, bias="add"), make_context(tied))
    assert made.flags == ()
    assert widths.apply(tied, made).spec.flags == tied.spec.flags


def test_the_refit_stands_inputs_that_repeat_each_other() -> None:
    inputs, _, w, _ = problem(1, tokens=4)  # fewer tokens than channels: the Gram matrix is singular
    twice = np.hstack([inputs[:, :6], inputs[:, :6]])
    new = refit(w, torch.from_numpy(twice.T @ twice), torch.arange(6))
    dense = twice @ w.numpy().T
    assert torch.isfinite(new).all()
    assert np.square(dense - twice[:, :6] @ new.numpy().T).sum() < 0.05 * np.square(dense).sum()


@settings(max_examples=40, deadline=None)
@given(rate=st.floats(0.01, 0.85), multiple_of=st.sampled_from([1, 4, 8, 10]))
def test_a_rate_leaves_the_largest_aligned_width_that_loses_enough(
    tied: CausalLM, make_context: MakeContext, rate: float, multiple_of: int
) -> None:
    left = widths.widths(tied, config_of(rate=rate, multiple_of=multiple_of), make_context(tied), {})
    width = left.get(("ffn", 0), 80)
    assert set(left.values()) <= {width}
    assert width % multiple_of == 0
    assert width <= 80 * (1 - rate) + 1e-6
    assert width + multiple_of > 80 * (1 - rate) - 1e-6


@settings(max_examples=40, deadline=None)
@given(keep=st.floats(0.75, 0.999), multiple_of=st.sampled_from([1, 4, 8, 10]))
def test_the_target_is_reached_by_less_than_a_step(
    tied: CausalLM, make_context: MakeContext, keep: float, multiple_of: int
) -> None:
    context = make_context(tied, keep=keep)
    found = widths.widths(tied, config_of(multiple_of=multiple_of), context, {})
    left = cut_channels(tied, {layer: range(width) for (_, layer), width in found.items()}).spec.num_parameters
    step = multiple_of * 3 * 3 * tied.spec.hidden_size  # three matrices of three layers
    assert context.target_parameters is not None
    assert context.target_parameters - step < left <= context.target_parameters


def test_a_rate_stops_where_the_target_is_reached(tied: CausalLM, make_context: MakeContext) -> None:
    channel = 3 * 3 * tied.spec.hidden_size
    total = tied.spec.num_parameters
    context = make_context(tied, keep=(total - 16 * channel) / total)
    assert set(widths.widths(tied, config_of(rate=0.5), context, {}).values()) == {64}


@pytest.mark.parametrize("fields", [{}, {"rate": 0.5}])
def test_nothing_goes_once_the_target_is_reached(
    tied: CausalLM, make_context: MakeContext, fields: dict[str, float]
) -> None:
    """Not even to align a width that was not aligned."""
    made = widths.plan(tied, config_of(multiple_of=64, **fields), make_context(tied, keep=1.0))
    assert made.keep == {}
    assert widths.apply(tied, made).spec == tied.spec


def test_biases_count_as_part_of_a_channel(untied: CausalLM) -> None:
    per_channel = (untied.spec.num_parameters - cut_channels(untied, {2: range(79)}).spec.num_parameters) / 1
    assert units.unit_parameters(untied, ("ffn", 2)) == per_channel == 3 * untied.spec.hidden_size + 2


def test_without_a_rate_or_a_target_the_stage_asks_for_one(tied: CausalLM, make_context: MakeContext) -> None:
    with pytest.raises(StageError, match=r"'rate'.*'target'"):
        widths.plan(tied, config_of(), make_context(tied))


def test_a_target_beyond_the_ffns_is_an_error(tied: CausalLM, make_context: MakeContext) -> None:
    with pytest.raises(StageError, match=r"narrowest ffn.*nearest target is params=0\.\d+"):
        widths.plan(tied, config_of(), make_context(tied, keep=0.1))


def test_refitted_weights_have_the_dtype_of_the_model(tied: CausalLM, make_context: MakeContext) -> None:
    half = replace(tied, weights={name: tensor.bfloat16() for name, tensor in tied.weights.items()})
    cut = widths.apply(half, widths.plan(half, config_of(rate=0.25), make_context(half)))
    assert {tensor.dtype for tensor in cut.weights.values()} == {torch.bfloat16}


@torch.no_grad()
def without_heads(theirs: Any, keep: Mapping[int, Sequence[int]]) -> Any:
    """The model with nothing coming out of the other KV groups' query heads."""
    cut = copy.deepcopy(theirs)
    config = cut.config
    size = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    for layer, groups in keep.items():
        for group in set(range(config.num_key_value_heads)) - set(groups):
            cut.model.layers[layer].self_attn.o_proj.weight[:, group * size : (group + 1) * size] = 0
    return cut


def test_what_heads_are_heard_to_say_is_what_transformers_hooks_hear(
    pair: tuple[CausalLM, Any], make_context: MakeContext
) -> None:
    ours, theirs = pair
    context = make_context(ours)
    caught = projection_inputs(theirs, context.tokens(ours), "self_attn.o_proj")
    heard = heard_by(ours, context, "heads")
    for layer, x in enumerate(caught):
        assert heard[layer].unit == theirs.config.num_attention_heads // theirs.config.num_key_value_heads * 16
        torch.testing.assert_close(heard[layer].gram, x.T @ x, rtol=1e-3, atol=1e-3 * float(x.square().sum(0).max()))


@pytest.mark.parametrize("restore", [False, True])
def test_heads_and_channels_go_at_once_by_their_rates(
    one_pair: tuple[CausalLM, Any], make_context: MakeContext, tmp_path: Path, restore: bool
) -> None:
    ours, theirs = one_pair
    rates = {"ffn": (0.5, 0.0, 0.5), "heads": (0.5, 0.5, 0.0)}
    config = config_of(of=("ffn", "heads"), rates=rates, restore=restore, score="wanda")
    made = widths.plan(ours, config, make_context(ours))
    cut = widths.apply(ours, made)
    assert [layer.intermediate_size for layer in cut.spec.layers] == [40, 80, 40]
    assert [layer.num_key_value_heads for layer in cut.spec.layers] == [1, 1, 2]
    assert [layer.num_attention_heads for layer in cut.spec.layers] == [3, 3, 6]
    if not restore:
        tokens = torch.randint(0, 700, (2, 30), generator=torch.Generator().manual_seed(2))
        expected = logits(zeroed(without_heads(theirs, kept(made, "heads")), kept(made)), tokens)
        walk = Walk(cut, tokens, torch.device("cpu"), torch.float32)
        dense = dense_variant(cut.spec)
        (rows,) = [group[dense].log_probs for group in walk.readouts(walk.run([dense]))]
        torch.testing.assert_close(rows, expected[:, :-1].log_softmax(-1).flatten(0, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("allocation", ["global", "kl", "marginal", "ramp"])
def test_every_allocation_reaches_the_target_by_less_than_a_step(
    one_pair: tuple[CausalLM, Any], make_context: MakeContext, allocation: str
) -> None:
    ours, _ = one_pair
    context = make_context(ours, keep=0.8)
    config = config_of(of=("ffn", "heads"), allocation=allocation, score="wifv", slope=0.02)
    cut = widths.apply(ours, widths.plan(ours, config, context))
    assert context.target_parameters is not None
    largest = max(8 * units.unit_parameters(ours, ("ffn", 0)), units.unit_parameters(ours, ("heads", 0)))
    steps = 1 if allocation != "ramp" else 6  # a rate per layer and kind is rounded for each
    assert context.target_parameters - steps * largest < cut.spec.num_parameters <= context.target_parameters


def test_rates_are_asked_for_every_layer(tied: CausalLM, make_context: MakeContext) -> None:
    with pytest.raises(StageError, match="no rate for the ffn of layer 2"):
        widths.plan(tied, config_of(rates={"ffn": (0.1, 0.1)}), make_context(tied))


def test_a_stage_has_a_rate_or_rates() -> None:
    with pytest.raises(ValueError, match="at most one of"):
        config_of(rate=0.1, rates={"ffn": (0.1,)})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rate": 0.1, "of": ("ffn", "ffn")}, "names a kind twice"),
        ({"rates": {"ffn": (0.1,)}, "of": ("ffn", "heads")}, r"are for \['ffn'\], and 'of' is"),
    ],
)
def test_kinds_and_their_rates_go_together(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        config_of(**fields)


def test_rates_of_one_remove_sub_blocks_as_the_layers_stage_does(tied: CausalLM, make_context: MakeContext) -> None:
    config = config_of(of=("ffn", "heads"), rates={"ffn": (1.0, 0.0, 1.0), "heads": (0.0, 0.0, 1.0)}, multiple_of=32)
    cut = widths.apply(tied, widths.plan(tied, config, make_context(tied)))
    there = cut_layers(cut_sub_blocks(tied, attention=[2], ffn=[0, 2]), [0, 1])
    assert cut.spec == there.spec
    assert cut.weights.keys() == there.weights.keys()
    assert all(torch.equal(loaded(cut.weights[name]), loaded(there.weights[name])) for name in there.weights)


def test_rates_leave_something(tied: CausalLM, make_context: MakeContext) -> None:
    with pytest.raises(StageError, match="remove every sub-block"):
        widths.plan(
            tied, config_of(of=("ffn", "heads"), rates={"ffn": (1.0,) * 3, "heads": (1.0,) * 3}), make_context(tied)
        )


def test_rates_do_not_go_beyond_the_target(tied: CausalLM, make_context: MakeContext) -> None:
    half = config_of(rates={"ffn": (0.5,) * 3}, multiple_of=8)
    gone = (
        tied.spec.num_parameters - widths.apply(tied, widths.plan(tied, half, make_context(tied))).spec.num_parameters
    )
    step = 8 * 3 * tied.spec.hidden_size
    for spare, fits in ((gone, True), (gone - step, True), (gone - 3 * step, False)):
        context = replace(make_context(tied), target_parameters=tied.spec.num_parameters - spare)
        with nullcontext() if fits else pytest.raises(StageError, match="'rates' remove more than the target allows"):
            widths.plan(tied, half, context)
