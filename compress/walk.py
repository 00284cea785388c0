"""The walk: calibration tokens go through the layers in order, for a whole set of variants at once.

A variant is one decision per layer. Variants that agree on layers 0..i share their hidden states up to there, so
each distinct prefix is computed once, and each layer's weights are fetched once however many variants ride on it.
Leave-one-out over L layers costs about L/2 forward passes instead of L.

Letters in shape comments: N sequences, T tokens of each, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flabc.console import progress
from flabc.families import Part
from flabc.spec import ModelSpec

from .criteria import Readout
from .model import CausalLM

#: Sequences computed at once.
BATCH = 4

#: Rows of logits held at once: small enough to stay in the processor's cache.
LOGIT_ROWS = 256


@dataclass(frozen=True, order=True)
class Decision:
    """What is left of a layer in a variant."""

    attention: bool = True
    ffn: bool = True

    @property
    def skips(self) -> bool:
        """Whether nothing of the layer is left."""
        return not (self.attention or self.ffn)


WHOLE = Decision()
GONE = Decision(attention=False, ffn=False)

Variant = tuple[Decision, ...]

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
    """

    model: CausalLM
    tokens: Tensor
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def run(self, variants: Iterable[Variant], listener: Listener | None = None) -> dict[Variant, Tensor]:
        """The hidden states of each variant before the final norm, (N, T, D).

        Args:
            variants: each as long as the model has layers.
            listener: opened around each layer while it runs; meant for walks with one variant.
        """
        wanted = list(dict.fromkeys(variants))
        start = self.embed()
        states: dict[Variant, Tensor] = {(): start}
        positions = self.positions(start)
        with progress("walking the layers", sum(steps_of(wanted))) as advance:
            for index in range(len(self.model.spec.layers)):
                branches = dict.fromkeys(variant[: index + 1] for variant in wanted)
                states = self._through(index, branches, states, positions, listener, advance)
        return {variant: states[variant] for variant in wanted}

    def _through(
        self,
        index: int,
        branches: Iterable[Variant],
        states: Mapping[Variant, Tensor],
        positions: Mapping[str, Any],
        listener: Listener | None,
        advance: Callable[[int], None],
    ) -> dict[Variant, Tensor]:
        """One layer for all prefixes that end in it; the weights are fetched once."""
        weights = self.fetch(index)
        after: dict[Variant, Tensor] = {}
        for prefix in branches:
            hidden = states[prefix[:-1]]
            if not prefix[-1].skips:
                layer = build_layer(self.model, index, prefix[-1], weights)
                with listener(index, layer) if listener else nullcontext():
                    hidden = forward(layer, hidden, positions)
                advance(1)
            after[prefix] = hidden
        return after

    def embed(self) -> Tensor:
        """The hidden states that the first layer receives, (N, T, D)."""
        embedding = self.model.tensor("embedding").to(self.device, self.dtype)
        return nn.functional.embedding(self.tokens.to(self.device), embedding)

    def fetch(self, index: int) -> dict[str, Tensor]:
        """One layer's weights, where and in the precision that the walk computes."""
        return {name: t.to(self.device, self.dtype) for name, t in self.model.layer_weights(index).items()}

    def positions(self, hidden: Tensor) -> dict[str, Any]:
        """What every layer needs to know about positions: ids and rotary cos and sin."""
        ids = torch.arange(self.tokens.shape[1], device=self.device)[None]
        rotary = _class(self.model.family.rotary)(config=layer_config(self.model, 0)).to(self.device)
        return {"position_ids": ids, "position_embeddings": rotary(hidden[:1], ids)}

    @torch.no_grad()
    def stream(self, variant: Variant) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """The residual stream of a variant: before, between the sub-blocks of, and after each layer, (N, T, D) each."""
        hidden = self.embed()
        positions = self.positions(hidden)
        for index, decision in enumerate(variant):
            weights = self.fetch(index)
            between = self._half(index, Decision(decision.attention, ffn=False), weights, hidden, positions)
            after = self._half(index, Decision(attention=False, ffn=decision.ffn), weights, between, positions)
            yield index, (hidden, between, after)
            hidden = after

    def _half(
        self, index: int, half: Decision, weights: Mapping[str, Tensor], hidden: Tensor, positions: Mapping[str, Any]
    ) -> Tensor:
        """One sub-block of a layer and the residual around it."""
        return hidden if half.skips else forward(build_layer(self.model, index, half, weights), hidden, positions)

    @torch.no_grad()
    def readouts(self, hidden: Mapping[Variant, Tensor]) -> Iterator[dict[Variant, Readout]]:
        """What each variant says, a few hundred tokens at a time, the same tokens for all.

        The last position of each sequence is left out: nothing comes after it.
        """
        norm = self.model.tensor("final_norm").to(self.device, self.dtype)
        matrix = self.model.output_matrix.to(self.device, self.dtype)  # (V, D)
        targets = self.tokens[:, 1:].reshape(-1).to(self.device)
        flat = {variant: h[:, :-1].reshape(-1, h.shape[-1]) for variant, h in hidden.items()}
        eps = self.model.spec.rms_norm_eps
        for start in range(0, len(targets), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            yield {
                variant: Readout(_log_probs(h[rows], norm, matrix, eps), targets[rows]) for variant, h in flat.items()
            }

    def costs(
        self,
        dense: Tensor,
        variants: Mapping[Variant, Tensor],
        criterion: Callable[[Readout, Readout], Tensor],
    ) -> dict[Variant, float]:
        """The mean cost per token of each variant against the dense hidden states.

        Args:
            dense: hidden states of the dense model, (N, T, D).
            variants: hidden states of each variant, (N, T, D).
            criterion: one of ``criteria.CRITERIA``.
        """
        totals = dict.fromkeys(variants, 0.0)
        count = 0
        reference: Variant = ()  # no variant of a model is empty
        with progress("comparing with the dense model", self.tokens[:, 1:].numel()) as advance:
            for group in self.readouts({reference: dense, **variants}):
                base = group.pop(reference)
                for variant, readout in group.items():
                    totals[variant] += float(criterion(base, readout).sum())
                count += len(base.targets)
                advance(len(base.targets))
        return {variant: total / count for variant, total in totals.items()}


def steps_of(variants: Sequence[Variant]) -> list[int]:
    """Layer evaluations that the walk needs at each depth: distinct prefixes whose last layer is not skipped."""
    depth = len(variants[0]) if variants else 0
    return [sum(not p[-1].skips for p in {v[: i + 1] for v in variants}) for i in range(depth)]


def build_layer(model: CausalLM, index: int, decision: Decision, weights: Mapping[str, Tensor]) -> nn.Module:
    """Transformers' own decoder layer for one layer of the model, on the given weights, without copying them.

    Args:
        model: the model that the layer belongs to.
        index: which layer.
        decision: what is left of it.
        weights: the layer's tensors by their names inside the layer.
    """
    shape = model.spec.layers[index]
    present = {
        Part.ATTENTION: decision.attention and shape.has_attention,
        Part.FFN: decision.ffn and shape.has_ffn,
    }
    with torch.device("meta"):
        layer: nn.Module = _class(model.family.decoder_layer)(layer_config(model, index), 0)
    for slot in model.family.layer_tensors:
        if slot.part in present and not present[slot.part]:
            _silence(layer, slot.name.format(layer=index).split(f".{index}.", 1)[1])
    kept = {name: tensor for name, tensor in weights.items() if name in layer.state_dict()}
    layer.load_state_dict(kept, strict=True, assign=True)
    return layer.eval()


def layer_config(model: CausalLM, index: int) -> Any:
    """A transformers config in which every layer has the shape of layer ``index``."""
    from transformers import AutoConfig

    shape = {key: size or 1 for key, size in model.spec.layers[index].model_dump().items()}
    fields = {key: value for key, value in model.config.items() if key not in ("model_type", "transformers_version")}
    fields |= shape | {"head_dim": model.spec.head_dim, "num_hidden_layers": 1, "layer_types": None}
    config = AutoConfig.for_model(model.spec.family, **fields)
    config._attn_implementation = "sdpa"
    return config


class _Absent(nn.Module):
    """Stands where a sub-block was: it adds nothing to the residual stream."""

    def __init__(self, returns_pair: bool) -> None:
        super().__init__()
        self.returns_pair = returns_pair

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.returns_pair else zeros


def _silence(layer: nn.Module, parameter: str) -> None:
    """Take the module that owns a parameter out of the layer: a norm passes through, a sub-block adds nothing."""
    child = parameter.split(".")[0]
    present = getattr(layer, child)
    if isinstance(present, (_Absent, nn.Identity)):
        return
    is_norm = parameter.count(".") == 1
    setattr(layer, child, nn.Identity() if is_norm else _Absent(returns_pair="attn" in child))


def forward(layer: nn.Module, hidden: Tensor, positions: Mapping[str, Any]) -> Tensor:
    """One layer over sequences, (N, T, D) to (N, T, D), ``BATCH`` of them at a time."""
    return torch.cat([_forward(layer, part, positions) for part in torch.split(hidden, BATCH)])


def _forward(layer: nn.Module, hidden: Tensor, positions: Mapping[str, Any]) -> Tensor:
    # No mask: transformers' sdpa is causal then.
    result = layer(hidden, attention_mask=None, past_key_values=None, use_cache=False, **positions)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _log_probs(hidden: Tensor, norm: Tensor, matrix: Tensor, eps: float) -> Tensor:
    """Log-probabilities of the next token, (n, V), float32."""
    scaled = nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], norm.float(), eps)
    return torch.log_softmax((scaled.to(matrix.dtype) @ matrix.T).float(), -1)


def _class(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
