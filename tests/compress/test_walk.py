"""The walk, against transformers' own models with the parts really taken out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flabc.compress import decoder, walk
from flabc.compress.criteria import CRITERIA
from flabc.compress.model import CausalLM
from flabc.compress.walk import GONE, Decision, Variant, Walk, dense_variant, steps_of, without
from flabc.spec import LayerSpec

NO_ATTENTION, NO_FFN = Decision(attention=False), Decision(ffn=False)


def random_tokens(model: CausalLM, sequences: int = 6, length: int = 60) -> Tensor:
    """Enough for more than one batch of sequences and more than one block of logits."""
    return torch.randint(0, model.spec.vocab_size, (sequences, length), generator=torch.Generator().manual_seed(1))


def float_walk(model: CausalLM) -> Walk:
    return Walk(model, random_tokens(model), torch.device("cpu"), torch.float32)


@torch.no_grad()
def last_hidden(theirs: Any, tokens: Tensor) -> Tensor:
    """What transformers sends into the final norm, (N, T, D)."""
    caught: list[Tensor] = []
    handle = theirs.model.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    theirs(tokens, use_cache=False)
    handle.remove()
    return caught[0]


@torch.no_grad()
def log_probs(theirs: Any, tokens: Tensor) -> Tensor:
    """What transformers says after every token but the last of each sequence, (n, V)."""
    return theirs(tokens, use_cache=False).logits[:, :-1].log_softmax(-1).flatten(0, 1)


def drop_layer(theirs: Any, index: int) -> Any:
    cut = copy.deepcopy(theirs)
    del cut.model.layers[index]
    cut.config.num_hidden_layers = len(cut.model.layers)
    return cut


def silence(theirs: Any, index: int, decision: Decision) -> Any:
    """The model whose sub-block adds nothing: its output projection is zero."""
    cut = copy.deepcopy(theirs)
    layer = cut.model.layers[index]
    for projection, present in ((layer.self_attn.o_proj, decision.attention), (layer.mlp.down_proj, decision.ffn)):
        for parameter in projection.parameters() if not present else ():
            torch.nn.init.zeros_(parameter)
    return cut


def brute_force_kl(dense: Tensor, variant: Tensor) -> float:
    return float(torch.nn.functional.kl_div(variant, dense, log_target=True, reduction="none").sum(-1).mean())


def test_the_dense_walk_is_transformers_forward(pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = pair
    walker = float_walk(ours)
    dense = dense_variant(ours.spec)
    hidden = walker.run([dense])
    torch.testing.assert_close(hidden[dense], last_hidden(theirs, walker.tokens), atol=1e-5, rtol=1e-5)
    said = [group[dense] for group in walker.readouts(hidden)]
    assert len(said) > 1  # more than one block of logits
    expected = log_probs(theirs, walker.tokens)
    torch.testing.assert_close(torch.cat([readout.log_probs for readout in said]), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(torch.cat([readout.targets for readout in said]), walker.tokens[:, 1:].flatten())


def test_some_rows_alone_may_be_read_out(pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = pair
    whole = float_walk(ours)
    rows = torch.cat([whole.tokens.flatten(), torch.arange(0, ours.spec.vocab_size, 7)]).unique()
    dense = dense_variant(ours.spec)
    walker = replace(whole, rows=rows)
    said = [group[dense] for group in walker.readouts(walker.run([dense]))]
    expected = log_probs(theirs, walker.tokens)[:, rows].log_softmax(-1)
    torch.testing.assert_close(torch.cat([readout.log_probs for readout in said]), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(rows[torch.cat([readout.targets for readout in said])], walker.tokens[:, 1:].flatten())


def test_first_tokens_are_texts_of_one_token_beside_the_others(pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = pair
    firsts = random_tokens(ours, 2) % 50
    plain, dense = float_walk(ours), dense_variant(ours.spec)
    walker = replace(plain, firsts=firsts)
    hidden = walker.run([dense])
    alone = last_hidden(theirs, firsts.view(-1, 1)).view(2, 60, -1)
    torch.testing.assert_close(hidden[dense][-2:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden[dense][:-2], plain.run([dense])[dense], atol=1e-6, rtol=1e-6)
    said = torch.cat([group[dense].log_probs for group in walker.readouts(hidden)])
    torch.testing.assert_close(said, log_probs(theirs, walker.tokens), atol=2e-5, rtol=1e-4)


def test_leaving_each_part_out_costs_what_a_model_without_it_costs(pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = pair
    walker = float_walk(ours)
    dense = dense_variant(ours.spec)
    parts = list(product(range(len(dense)), (GONE, NO_ATTENTION, NO_FFN)))
    hidden = walker.run([dense, *(without(dense, layer, decision) for layer, decision in parts)])
    costs = walker.costs(hidden.pop(dense), hidden, CRITERIA["kl"].cost)
    reference = log_probs(theirs, walker.tokens)
    for layer, decision in parts:
        cut = drop_layer(theirs, layer) if decision is GONE else silence(theirs, layer, decision)
        expected = brute_force_kl(reference, log_probs(cut, walker.tokens))
        assert expected > 1e-4
        assert costs[without(dense, layer, decision)] == pytest.approx(expected, rel=1e-3), (layer, decision)


def test_the_perplexity_criterion_is_the_cross_entropy_of_the_cut_model(one_pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = one_pair
    walker = float_walk(ours)
    dense = dense_variant(ours.spec)
    variant = without(dense, 1)
    hidden = walker.run([dense, variant])
    found = walker.costs(hidden[dense], {variant: hidden[variant]}, CRITERIA["perplexity"].cost)[variant]
    said = log_probs(drop_layer(theirs, 1), walker.tokens)
    expected = torch.nn.functional.nll_loss(said, walker.tokens[:, 1:].flatten())
    assert found == pytest.approx(float(expected), rel=1e-4)


def test_many_decisions_at_once_are_many_cuts_at_once(one_pair: tuple[CausalLM, Any]) -> None:
    ours, theirs = one_pair
    walker = float_walk(ours)
    variant = (NO_FFN, GONE, NO_ATTENTION)
    cut = drop_layer(silence(silence(theirs, 0, NO_FFN), 2, NO_ATTENTION), 1)
    expected = last_hidden(cut, walker.tokens)
    torch.testing.assert_close(walker.run([variant])[variant], expected, atol=1e-5, rtol=1e-5)


def test_a_model_without_a_sub_block_walks_like_the_variant_without_it(one_pair: tuple[CausalLM, Any]) -> None:
    ours, _ = one_pair
    gone = {"self_attn": (0, NO_ATTENTION), "mlp": (2, NO_FFN)}
    lost = [f"model.layers.{layer}.{block}." for block, (layer, _) in gone.items()]
    weights = {name: tensor for name, tensor in ours.weights.items() if not name.startswith(tuple(lost))}
    first, second, third = ours.spec.layers
    no_attention = LayerSpec(num_attention_heads=0, num_key_value_heads=0, intermediate_size=first.intermediate_size)
    no_ffn = third.model_copy(update={"intermediate_size": 0})
    spec = ours.spec.model_copy(update={"layers": (no_attention, second, no_ffn)})
    dense = dense_variant(spec)
    variant = without(without(dense, *gone["self_attn"]), *gone["mlp"])
    without_weights = float_walk(replace(ours, spec=spec, weights=weights)).run([dense])[dense]
    assert torch.equal(without_weights, float_walk(ours).run([variant])[variant])


def test_a_walk_repeats_itself_bit_for_bit_whatever_rides_along(one_pair: tuple[CausalLM, Any]) -> None:
    ours, _ = one_pair
    dense = dense_variant(ours.spec)
    alone = float_walk(ours).run([dense])[dense]
    others = [without(dense, layer) for layer in range(len(dense))]
    assert torch.equal(alone, float_walk(ours).run([*others, dense])[dense])


def counted_steps(model: CausalLM, variants: list[Variant]) -> int:
    """Layers that a walk over two tokens really builds."""
    calls: list[int] = []
    build = walk.build_layer

    def counting(model: CausalLM, index: int, *rest: Any, **left: bool) -> Any:
        calls.append(index)
        return build(model, index, *rest, **left)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "build_layer", counting)
        Walk(model, torch.tensor([[1, 2]]), torch.device("cpu"), torch.float32).run(variants)
    return len(calls)


def test_leave_one_out_takes_half_the_layers_that_brute_force_takes(tied: CausalLM) -> None:
    dense = dense_variant(tied.spec)
    depth = len(dense)
    variants = [dense, *(without(dense, layer) for layer in range(depth))]
    # The dense model, and for each layer left out those behind it.
    expected = depth + sum(depth - 1 - layer for layer in range(depth))
    assert sum(steps_of(variants)) == counted_steps(tied, variants) == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([Decision(), GONE, NO_ATTENTION, NO_FFN])] * 3), min_size=1, max_size=6))
def test_the_steps_foretold_are_the_steps_taken(tied: CausalLM, variants: list[Variant]) -> None:
    trie: dict[Decision, Any] = {}
    for variant in variants:
        node = trie
        for decision in variant:
            node = node.setdefault(decision, {})

    def edges(node: dict[Decision, Any]) -> int:
        return sum((not decision.skips) + edges(below) for decision, below in node.items())

    assert sum(steps_of(variants)) == edges(trie) == counted_steps(tied, variants)


def test_each_layer_is_fetched_once_however_many_variants_ride(tied: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    fetch = CausalLM.layer_weights

    def counting(self: CausalLM, layer: int) -> dict[str, Tensor]:
        fetched.append(layer)
        return fetch(self, layer)

    monkeypatch.setattr(CausalLM, "layer_weights", counting)
    dense = dense_variant(tied.spec)
    float_walk(tied).run([dense, *(without(dense, layer) for layer in range(len(dense)))])
    assert fetched == list(range(len(dense)))


def test_the_listener_hears_each_layer_once_and_is_removed(tied: CausalLM) -> None:
    heard: list[int] = []
    modules: list[torch.nn.Module] = []

    @contextmanager
    def listener(index: int, module: torch.nn.Module) -> Iterator[None]:
        modules.append(module)
        handle = module.register_forward_hook(lambda *_: heard.append(index))
        yield
        handle.remove()

    walker = float_walk(tied)
    walker.run([dense_variant(tied.spec)], listener)
    batches = -(-len(walker.tokens) // decoder.BATCH)
    assert heard == [layer for layer in range(len(tied.spec.layers)) for _ in range(batches)]
    assert not any(module._forward_hooks for module in modules)


def test_the_walk_computes_in_the_dtype_it_is_given(tied: CausalLM) -> None:
    dense = dense_variant(tied.spec)
    exact = float_walk(tied)
    rough = replace(exact, dtype=torch.bfloat16)
    hidden = rough.run([dense])[dense]
    assert hidden.dtype == torch.bfloat16
    reference = exact.run([dense])[dense]
    assert 1e-4 < float((hidden.float() - reference).norm() / reference.norm()) < 0.05


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
def test_a_gpu_says_what_the_processor_says(one_pair: tuple[CausalLM, Any]) -> None:
    """Leave-one-out costs, with layers copied to the device while others are computed with."""
    source, _ = one_pair
    dense = dense_variant(source.spec)
    variants = [dense, *(without(dense, layer) for layer in range(len(source.spec.layers)))]
    found = []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        walk = Walk(source, random_tokens(source), device, torch.float32)
        states = walk.run(variants)
        costs = walk.costs(states[dense], states, CRITERIA["kl"].cost)
        found.append([costs[variant] for variant in variants])
    assert found[1] == pytest.approx(found[0], abs=1e-4)
