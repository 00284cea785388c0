"""The walk: calibration tokens go through the layers in order, for a whole set of variants at once.

A variant is one decision per layer. Variants that agree on layers 0..i share their hidden states up to there, so
each distinct prefix is computed once, and each layer's weights are fetched once however many variants ride on it.
Leave-one-out over L layers costs about L/2 forward passes instead of L.

Letters in shape comments: N sequences, T tokens of each, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from flabc.console import progress
from flabc.spec import ModelSpec

from .criteria import Readout
from .decoder import Surround, build_layer
from .devices import ahead, beside
from .model import CausalLM

#: Rows of logits held at once: small enough to stay in the processor's cache.
LOGIT_ROWS = 256


@dataclass(frozen=True, order=True)
class Decision:
    """What is left of a layer in a variant: its sub-blocks, and how many units of each kind that is narrowed."""

    attention: bool = True
    ffn: bool = True
    narrowed: tuple[tuple[str, int], ...] = ()

    @property
    def skips(self) -> bool:
        """Whether nothing of the layer is left."""
        return not (self.attention or self.ffn)


WHOLE = Decision()
GONE = Decision(attention=False, ffn=False)

Variant = tuple[Decision, ...]

#: From a model that holds one fetched layer, the layer's number and a decision to the model with that layer narrowed.
Narrow = Callable[[CausalLM, int, Decision], CausalLM]

#: Given a layer's number and its module, what is open while the layer runs for a variant.
Listener = Callable[[int, nn.Module], AbstractContextManager[None]]


def dense_variant(spec: ModelSpec) -> Variant:
    """The variant in which every layer is whole."""
    return (WHOLE,) * len(spec.layers)


def without(variant: Variant, layer: int, decision: Decision = GONE) -> Variant:
    """The variant with another decision for one layer."""
    return (*variant[:layer], decision, *variant[layer + 1 :])


@dataclass(frozen=True)
class Walk:
    """A model, tokens to send through it, and where and in which precision to compute.

    Args:
        model: the model; its weights are cast to ``dtype`` one layer at a time.
        tokens: (N, T).
        device: where to compute.
        dtype: in which precision.
        narrow: how a layer is narrowed, if decisions narrow any.
        rows: the tokens that are read out, ascending, (n,): probabilities are among these, and V becomes n. All that
            are in ``tokens`` are among them. None reads out all.
        firsts: tokens that go through the layers too, each alone as the first of a text, (M, T); N becomes N + M where
            there are hidden states. They are not read out.
    """

    model: CausalLM
    tokens: Tensor
    device: torch.device
    dtype: torch.dtype
    narrow: Narrow | None = None
    rows: Tensor | None = None
    firsts: Tensor | None = None

    @torch.no_grad()
    def run(self, variants: Iterable[Variant], listener: Listener | None = None) -> dict[Variant, Tensor]:
        """The hidden states of each variant before the final norm, (N, T, D).

        Args:
            variants: each as long as the model has layers.
            listener: opened around each layer while it runs; meant for walks with one variant.
        """
        wanted = list(dict.fromkeys(variants))
        states: dict[Variant, Tensor] = {(): self.embed()}
        with progress("walking the layers", sum(steps_of(wanted))) as advance:
            fetched = self.fetched()
            for index in range(len(self.model.spec.layers)):
                branches = dict.fromkeys(variant[: index + 1] for variant in wanted)
                states = self._through(index, branches, next(fetched), states, listener, advance)
        return {variant: states[variant] for variant in wanted}

    def _through(
        self,
        index: int,
        branches: Iterable[Variant],
        weights: Mapping[str, Tensor],
        states: Mapping[Variant, Tensor],
        listener: Listener | None,
        advance: Callable[[int], None],
    ) -> dict[Variant, Tensor]:
        """One layer for all prefixes that end in it, on weights that were fetched once."""
        after: dict[Variant, Tensor] = {}
        for prefix in branches:
            hidden = states[prefix[:-1]]
            if not prefix[-1].skips:
                layer = self.layer(index, prefix[-1], weights)
                with listener(index, layer) if listener else nullcontext():
                    hidden = self.forward(layer, index, hidden)
                advance(1)
            after[prefix] = hidden
        return after

    @cached_property
    def surround(self) -> Surround:
        """What is around the layers."""
        return Surround(self.model, self.device, self.dtype)

    @torch.no_grad()
    def embed(self) -> Tensor:
        """The hidden states that the first layer receives, (N, T, D)."""
        return self.surround.embed(self.tokens if self.firsts is None else torch.cat([self.tokens, self.firsts]))

    def forward(self, layer: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """One layer, of number ``index``, over the hidden states of the tokens, (N, T, D) to (N, T, D)."""
        return self.surround.forward(layer, index, hidden, 0 if self.firsts is None else len(self.firsts))

    def fetch(self, index: int) -> dict[str, Tensor]:
        """One layer's weights, where and in the precision that the walk computes."""
        return {name: t.to(self.device, self.dtype) for name, t in self.model.layer_weights(index).items()}

    def fetched(self) -> Iterator[dict[str, Tensor]]:
        """Every layer's weights in their order; a GPU is given the next ones while it computes with these.

        Let go of them before asking for the next: two layers are there at most. A processor would have to read while it
        computes, so there they are fetched when they are asked for.
        """
        layers = range(len(self.model.spec.layers))
        if self.device.type != "cuda":
            return map(self.fetch, layers)
        return ahead(beside(self.fetch, self.device), layers)

    def layer(self, index: int, decision: Decision, weights: Mapping[str, Tensor]) -> nn.Module:
        """A layer on weights that were fetched, with what a decision leaves of it."""
        model = self.model
        if decision.narrowed:
            assert self.narrow is not None, "the walk was not told how to narrow layers"
            named = {f"{model.layer_prefix(index)}{name}": tensor for name, tensor in weights.items()}
            model = self.narrow(replace(model, weights=named), index, decision)
            weights = model.layer_weights(index)
        return build_layer(model, index, weights, attention=decision.attention, ffn=decision.ffn)

    @torch.no_grad()
    def stream(
        self, variant: Variant, listener: Listener | None = None
    ) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """The residual stream of a variant: before, between the sub-blocks of, and after each layer, (N, T, D) each.

        Args:
            variant: as long as the model has layers.
            listener: opened around each sub-block while it runs, with a layer in which the other one is absent.
        """
        hidden, fetched = self.embed(), self.fetched()
        for index, decision in enumerate(variant):
            weights = next(fetched)
            between = self._half(index, Decision(decision.attention, ffn=False), weights, hidden, listener)
            after = self._half(index, Decision(attention=False, ffn=decision.ffn), weights, between, listener)
            del weights
            yield index, (hidden, between, after)
            hidden = after

    def _half(
        self, index: int, half: Decision, weights: Mapping[str, Tensor], hidden: Tensor, listener: Listener | None
    ) -> Tensor:
        """One sub-block of a layer and the residual around it."""
        if half.skips:
            return hidden
        layer = self.layer(index, half, weights)
        with listener(index, layer) if listener else nullcontext():
            return self.forward(layer, index, hidden)

    @torch.no_grad()
    def readouts(self, hidden: Mapping[Variant, Tensor]) -> Iterator[dict[Variant, Readout]]:
        """What each variant says, a few hundred tokens at a time, the same tokens for all.

        The last position of each sequence is left out: nothing comes after it.
        """
        for targets, read in self._groups():
            yield {variant: Readout(read(h), targets) for variant, h in hidden.items()}

    def _groups(self) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        """A few hundred positions at a time: the tokens that came next, and how hidden states are read there."""
        head, targets = self.surround.head(self.rows), self.tokens[:, 1:].reshape(-1)
        targets = (targets if self.rows is None else torch.searchsorted(self.rows, targets)).to(self.device)
        for places in torch.arange(len(targets), device=self.device).split(LOGIT_ROWS):  # type: ignore[no-untyped-call]
            row, at = places // (self.tokens.shape[1] - 1), places % (self.tokens.shape[1] - 1)
            yield targets[places], lambda hidden, row=row, at=at: head.log_probs(hidden[row, at])  # type: ignore[misc]

    @torch.no_grad()
    def costs(
        self,
        dense: Tensor,
        variants: Mapping[Variant, Tensor],
        criterion: Callable[[Readout, Readout], Tensor],
    ) -> dict[Variant, float]:
        """The mean cost per token of each variant against the dense hidden states.

        One variant's logits are held beside the dense ones, however many variants there are.

        Args:
            dense: hidden states of the dense model, (N, T, D).
            variants: hidden states of each variant, (N, T, D).
            criterion: one of ``criteria.CRITERIA``.
        """
        totals = dict.fromkeys(variants, 0.0)
        count = self.tokens[:, 1:].numel()
        with progress("comparing with the dense model", count) as advance:
            for targets, read in self._groups():
                base = Readout(read(dense), targets)
                for variant, hidden in variants.items():
                    totals[variant] += float(criterion(base, Readout(read(hidden), targets)).sum())
                advance(len(targets))
        return {variant: total / count for variant, total in totals.items()}


def steps_of(variants: Sequence[Variant]) -> list[int]:
    """Layer evaluations that the walk needs at each depth: distinct prefixes whose last layer is not skipped."""
    depth = len(variants[0]) if variants else 0
    return [sum(not p[-1].skips for p in {v[: i + 1] for v in variants}) for i in range(depth)]
