"""The restore stage: closed-form refits that follow the dense model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from flabc.compress import load, restore
from flabc.compress.config import Calibration, RestoreConfig
from flabc.compress.data import corpus
from flabc.compress.model import CausalLM, cut_channels, cut_layers, cut_sub_blocks, cut_vocab
from flabc.compress.stage import Context
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


def test_the_change_is_damped_least_squares() -> None:
    rng = np.random.default_rng(0)
    x, gap, damping = rng.normal(size=(5000, 6)), rng.normal(size=(5000, 4)), 0.3
    ridge = np.sqrt(damping * (x**2).sum(0).mean())
    expected = np.linalg.lstsq(np.vstack([x, ridge * np.eye(6)]), np.vstack([gap, np.zeros((6, 4))]), rcond=None)[0].T
    found, shift = restore.explain(torch.from_numpy(gap).float(), torch.from_numpy(x).float(), damping)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not shift.any()


def test_a_bias_takes_the_means_as_sklearns_ridge_does() -> None:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(1)
    x, gap, damping = rng.normal(2, 1, size=(5000, 6)), rng.normal(3, 1, size=(5000, 4)), 0.3
    centred = x - x.mean(0)
    expected = Ridge(alpha=damping * (centred**2).sum(0).mean()).fit(x, gap)
    found, shift = restore.explain(torch.from_numpy(gap).float(), torch.from_numpy(x).float(), damping, intercept=True)
    np.testing.assert_allclose(found, expected.coef_, atol=1e-4)
    np.testing.assert_allclose(shift, expected.intercept_, atol=1e-3)


def test_a_model_that_was_not_cut_is_left_as_it_is(any_tiny: Path) -> None:
    dense = load.load(str(any_tiny))
    plan = restore.plan(dense, RestoreConfig(), context_for(dense))
    for name, tensor in plan.refitted.items():
        torch.testing.assert_close(tensor, dense.weights[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["llama-untied-biased", "qwen2-tied", "phi3-untied", "starcoder2-tied", "granite-tied"]
)
def test_what_was_cut_comes_nearer_to_the_dense_model(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    context = context_for(dense)
    cut = cut_channels(cut_layers(dense, [0, 2]), {0: range(60), 1: range(60)})
    restored = restore.apply(cut, restore.plan(cut, RestoreConfig(), context))
    tokens = context.tokens(cut)
    wanted = last_states(dense, tokens)
    before, after = ((last_states(model, tokens) - wanted).square().mean() for model in (cut, restored))
    assert after < 0.8 * before
    assert restored.spec == cut.spec


@pytest.mark.parametrize("name", ["qwen2-tied", "granite-tied"])  # the latter scales what its FFN adds
def test_the_reported_distance_is_that_of_the_restored_model(tiny: Callable[[str], Path], name: str) -> None:
    dense = load.load(str(tiny(name)))
    context = context_for(dense)
    cut = cut_layers(dense, [0, 2])
    plan = restore.plan(cut, RestoreConfig(), context)
    tokens = context.tokens(cut)
    wanted, found = last_states(dense, tokens), last_states(restore.apply(cut, plan), tokens)
    distance = float((found - wanted).square().sum() / wanted.square().sum())
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
    assert float(after / wanted.square().sum()) == pytest.approx(plan.details["last_layer"], rel=1e-2)


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
