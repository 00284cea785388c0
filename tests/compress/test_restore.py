"""The restore stage: closed-form refits that follow the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flabc.compress import load, restore
from flabc.compress.config import Calibration, RestoreConfig
from flabc.compress.data import corpus
from flabc.compress.model import CausalLM, cut_channels, cut_layers, cut_sub_blocks, cut_vocab
from flabc.compress.stage import Context
from flabc.compress.stored import loaded
from flabc.compress.walk import Walk, dense_variant


def context_for(dense: CausalLM, first_tokens: float = 0.0) -> Context:
    return Context(
        dense=dense,
        calibration=Calibration(sequences=8, sequence_length=64, first_tokens=first_tokens),
        documents=corpus.load("python-stdlib", "calibration")[:60],
        heldout=corpus.load("python-stdlib", "heldout")[:20],
        target_parameters=None,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=0,
    )


def last_states(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    variant = dense_variant(model.spec)
    return Walk(model, tokens, torch.device("cpu"), torch.float32).run([variant])[variant]


def test_a_model_that_was_not_cut_is_left_as_it_is(any_tiny: Path) -> None:
    dense = load.load(str(any_tiny))
    assert not restore.plan(dense, RestoreConfig(), context_for(dense)).refitted


def test_what_lies_before_the_first_cut_is_left_as_it_is(any_tiny: Path) -> None:
    dense = load.load(str(any_tiny))
    last = len(dense.spec.layers) - 1
    plan = restore.plan(cut_channels(dense, {last: range(20)}), RestoreConfig(), context_for(dense))
    assert dense.name("down", last) in plan.refitted
    for name, tensor in plan.refitted.items():
        if f".layers.{last}." not in name:
            torch.testing.assert_close(loaded(tensor), loaded(dense.weights[name]), atol=1e-4, rtol=1e-4)


def distance_on(tokens: torch.Tensor, model: CausalLM, dense: CausalLM) -> float:
    """How far a model's last states are from the dense model's, each token's relative to its own."""
    wanted, found = last_states(dense, tokens), last_states(model, tokens)
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


@pytest.mark.parametrize("name", ["qwen2-tied", "phi3-untied", "starcoder2-tied", "granite-tied", "gemma2-tied"])
def test_a_chosen_damping_is_nearer_than_hardly_any_on_text_that_was_not_heard(
    tiny: Callable[[str], Path], name: str
) -> None:
    dense = load.load(str(tiny(name)))
    context = context_for(dense)
    cut = cut_channels(dense, {at: range(40) for at in range(len(dense.spec.layers))})
    chosen, hardly, outputs_only = (
        restore.apply(cut, restore.plan(cut, config, context))
        for config in (RestoreConfig(), RestoreConfig(damping=1e-4), RestoreConfig(inputs=False))
    )
    unheard = replace(context, documents=context.heldout, seed=1).tokens(dense)
    nothing, best, worse, without_inputs = (distance_on(unheard, m, dense) for m in (cut, chosen, hardly, outputs_only))
    assert best < 0.97 * nothing
    assert best < worse
    assert best < 1.001 * without_inputs


@pytest.mark.parametrize("name", ["llama-tied", "phi3-untied", "starcoder2-tied", "granite-tied", "gemma2-tied"])
def test_inputs_are_refitted_to_what_transformers_layers_receive(tiny: Callable[[str], Path], name: str) -> None:
    from sklearn.linear_model import Ridge
    from transformers import AutoModelForCausalLM

    folder = tiny(name)
    dense = load.load(str(folder))
    context, damping = context_for(dense, first_tokens=0.5), 0.05
    cut = cut_channels(dense, {0: range(30)})  # the first layer's output differs, and so does what the second receives
    tokens = context.tokens(cut)
    firsts = context.firsts(cut, tokens)
    plan = restore.plan(cut, RestoreConfig(damping=damping), context)
    restored = restore.apply(cut, plan)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    norm = reference.model.layers[1].input_layernorm
    sequences = [tokens, *([] if firsts is None else [firsts.view(-1, 1)])]
    wanted, received = list[np.ndarray](), list[np.ndarray]()
    with torch.no_grad():
        for each in sequences:
            wanted.append(norm(reference(each, output_hidden_states=True).hidden_states[1]).flatten(0, 1).numpy())
            walk = Walk(restored, each, torch.device("cpu"), torch.float32)
            (_, (_, _, after)) = next(walk.stream(dense_variant(restored.spec)))
            received.append(norm(after).flatten(0, 1).numpy())
    x = np.concatenate(received)
    size = np.sqrt((x**2).sum(0))
    fit = Ridge(alpha=damping, fit_intercept=False).fit(x / size, np.concatenate(wanted) - x)
    for role in ("q", "v", "qkv"):
        if dense.family.has(role):
            old = reference.get_parameter(dense.name(role, 1)).detach().numpy()
            new = loaded(restored.weights[dense.name(role, 1)]).float().numpy()
            np.testing.assert_allclose(new, old + old @ (fit.coef_ / size), atol=1e-3)
            assert np.abs(new - old).max() > 3e-3
    assert "model.layers.1.self_attn.o_proj.weight" in plan.refitted
    assert not {name for name in plan.refitted if "norm" in name or "embed" in name}


@pytest.mark.parametrize("name", ["qwen2-tied", "granite-tied"])  # the latter scales what its FFN adds
def test_the_reported_distance_is_that_of_the_restored_model(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    context = context_for(dense)
    cut = cut_layers(dense, [0, 2])
    plan = restore.plan(cut, RestoreConfig(), context)
    tokens = context.tokens(cut)
    distance = distance_on(tokens, restore.apply(cut, plan), dense)
    assert abs(plan.details["last_layer"] - distance) < 1e-3 * max(1e-3, distance) + 1e-5


def test_targets_are_the_dense_states_where_each_kept_sub_block_ends(tiny: Callable[[str], Path]) -> None:
    dense = load.load(str(tiny("llama-tied")))
    context = context_for(dense)
    keep_rows = list(range(0, dense.spec.vocab_size - 1))
    cut = cut_layers(cut_vocab(dense, keep_rows), [1])  # the first and the last layer are gone
    tokens = torch.tensor([[5, 9, 30, 31]])
    (states,) = restore.dense_states(cut, context, tokens, None)
    two = cut_sub_blocks(cut_layers(dense, [0, 1]), ffn=[1])
    torch.testing.assert_close(states["o"].hidden, last_states(two, tokens))
    torch.testing.assert_close(states["down"].hidden, last_states(dense, tokens))  # makes up for the removed ones too


@pytest.mark.parametrize("name", ["qwen2-tied", "gemma2-tied"])
def test_targets_of_first_tokens_are_the_states_of_texts_of_one_token(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    context, tokens, firsts = context_for(dense), torch.tensor([[5, 9, 30]]), torch.tensor([[31, 7, 7], [8, 5, 2]])
    for with_firsts, alone in zip(
        restore.dense_states(dense, context, tokens, firsts),
        restore.dense_states(dense, context, firsts.view(-1, 1), None),
        strict=True,
    ):
        for role, aim in with_firsts.items():
            torch.testing.assert_close(aim.hidden[1:].flatten(0, 1), alone[role].hidden.squeeze(1))
            if aim.output is not None:
                torch.testing.assert_close(aim.output[3:], alone[role].output)


@pytest.mark.parametrize("name", ["qwen2-tied", "gemma2-tied"])
def test_hearing_first_tokens_brings_texts_of_one_token_nearer(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    cut = cut_channels(dense, {at: range(40) for at in range(len(dense.spec.layers))})
    alone = context_for(dense).tokens(dense).unique()[:, None]
    wanted, gaps = last_states(dense, alone), list[float]()
    for share in (0.0, 0.5):
        plan = restore.plan(cut, RestoreConfig(), context_for(dense, share))
        gaps.append(float((last_states(restore.apply(cut, plan), alone) - wanted).square().mean()))
    assert gaps[1] < 0.9 * gaps[0]


@pytest.mark.parametrize("name", ["gemma2-tied", "gemma3_text-tied"])
def test_behind_a_norm_what_the_dense_projections_gave_is_followed(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    context = context_for(dense)
    cut = cut_channels(dense, {at: range(60) for at in range(len(dense.spec.layers))})
    plan = restore.plan(cut, RestoreConfig(), context)
    restored, tokens = restore.apply(cut, plan), context.tokens(cut)
    wanted = last_states(dense, tokens)
    before, after = ((last_states(model, tokens) - wanted).square().sum() for model in (cut, restored))
    assert after < 0.8 * before
    assert distance_on(tokens, restored, dense) == pytest.approx(plan.details["last_layer"], rel=1e-2)


@pytest.mark.parametrize("name", ["gemma2-tied", "gemma3_text-tied"])
def test_behind_a_norm_projections_are_told_by_transformers(tiny: Callable[[str], Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name)
    dense = load.load(str(folder))
    cut = cut_layers(dense, [1])
    tokens = torch.tensor([[5, 9, 30, 31]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gave = dict[str, torch.Tensor]()
    layer = model.model.layers[1]
    for role, projection in {"o": layer.self_attn.o_proj, "down": layer.mlp.down_proj}.items():
        projection.register_forward_hook(lambda _, __, output, role=role: gave.update({role: output[0]}))
    model(tokens)
    (states,) = restore.dense_states(cut, context_for(dense), tokens, None)
    assert states.keys() == gave.keys()
    for role, aim in states.items():
        torch.testing.assert_close(aim.output, gave[role], msg=role)
