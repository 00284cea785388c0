"""The vocabulary in which families are written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Axis(StrEnum):
    """A space that an axis of a tensor lives in. Tensors that share a space are cut together.

    ``VOCAB`` and ``HIDDEN`` are the whole model's; ``QUERY`` (num_attention_heads * head_dim), ``KV``
    (num_key_value_heads * head_dim) and ``INTERMEDIATE`` belong to one layer; ``HEAD`` is head_dim.
    """

    VOCAB = "vocab"
    HIDDEN = "hidden"
    QUERY = "query"
    KV = "kv"
    INTERMEDIATE = "intermediate"
    HEAD = "head"


class Part(StrEnum):
    """Which part of the model a tensor belongs to: what is counted, and what goes when a sub-block goes."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    FFN = "ffn"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True)
class TensorSlot:
    """One tensor of a family.

    Args:
        name: its name in the checkpoint; ``{layer}`` stands for the layer's number.
        axes: the space of each axis, in the order of the tensor's shape; a tuple of spaces that lie one after
            another where projections are fused.
        part: what it belongs to; a norm goes with the sub-block that it feeds.
        role: how the export graph calls it, e.g. ``q`` or ``q_bias``.
        when: a config key that must be true for the tensor to exist, or None if it always does.
    """

    name: str
    axes: tuple[Axis | tuple[Axis, ...], ...]
    part: Part
    role: str
    when: str | None = None

    def segments(self, axis: int) -> tuple[Axis, ...]:
        """The spaces that lie along an axis, one after another."""
        spaces = self.axes[axis]
        return spaces if isinstance(spaces, tuple) else (spaces,)


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Args:
        name: ``model_type`` in Hugging Face's config.
        architecture: the transformers class that loads a checkpoint of the family.
        config: the transformers class of its config.
        decoder_layer: the transformers class of one layer, as ``module:Class``.
        backbone: the transformers class of the model without its output matrix, as ``module:Class``.
        tensors: the tensors outside the layers.
        layer_tensors: the tensors of one layer.
        defaults: config values that transformers assumes when the file does not say.
        requires: config keys whose value must be one of those listed (the first is assumed if absent).
        norm_eps: the config key of the norms' epsilon.
        embedding_multiplier: the config key of what the embedded tokens are multiplied by, outside the embedding.
        output_multiplier: the config key of what each sub-block's output is multiplied by.
        logits_scaling: the config key of what the logits are divided by.
        logits_softcapping: the config key of the bound that logits are bent to.
        normed_outputs: whether a norm stands between a sub-block's output projection and the residual stream.
        typed_masks: whether the model takes a mask for each type of layer, instead of one for all.
        eager: whether transformers computes its attention right only without fused kernels.
        activation: the config key of the FFN's activation.
        norm_offset: what is added to a norm's weight before it multiplies.
        embedding_root: whether embedded tokens are multiplied by the root of hidden_size.
        attention_multiplier: the config key of what attention scores are multiplied by.
        query_scalar: the config key of the number by whose root attention scores are divided.
        attention_softcapping: the config key of the bound that attention scores are bent to.
    """

    name: str
    architecture: str
    config: str
    decoder_layer: str
    backbone: str
    tensors: tuple[TensorSlot, ...]
    layer_tensors: tuple[TensorSlot, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    norm_eps: str = "rms_norm_eps"
    embedding_multiplier: str | None = None
    output_multiplier: str | None = None
    logits_scaling: str | None = None
    logits_softcapping: str | None = None
    normed_outputs: bool = False
    typed_masks: bool = False
    eager: bool = False
    activation: str = "hidden_act"
    norm_offset: float = 0.0
    embedding_root: bool = False
    attention_multiplier: str | None = None
    query_scalar: str | None = None
    attention_softcapping: str | None = None

    def has(self, role: str) -> bool:
        """Whether models of the family have, or may have, tensors of that role."""
        return any(slot.role == role for slot in (*self.tensors, *self.layer_tensors))

    def finished(self, logits: Any, config: Mapping[str, Any]) -> Any:
        """What the model makes of the output matrix's product, a torch tensor: divided, and bent to a bound."""
        if self.logits_scaling:
            logits = logits / config[self.logits_scaling]
        cap = config.get(self.logits_softcapping) if self.logits_softcapping else None
        return cap * (logits / cap).tanh() if cap else logits

    @property
    def multipliers(self) -> tuple[str, ...]:
        """The config keys of what embedding, outputs and logits are multiplied, divided or bounded by."""
        keys = (self.embedding_multiplier, self.output_multiplier, self.logits_scaling, self.logits_softcapping)
        return tuple(key for key in keys if key)

    def flag(self, config: Mapping[str, Any], key: str) -> bool:
        """Whether a config switches a kind of tensor on, with the family's default where it is silent."""
        return bool(config.get(key, self.defaults.get(key, False)))


def classes(module: str, stem: str) -> dict[str, Any]:
    """The transformers classes of a family whose classes share a stem: arguments of ``Family``."""
    place = f"transformers.models.{module}.modeling_{module}"
    return {
        "architecture": f"{stem}ForCausalLM",
        "config": f"{stem}Config",
        "decoder_layer": f"{place}:{stem}DecoderLayer",
        "backbone": f"{place}:{stem}Model",
    }


def norm(name: str, role: str, part: Part, *, bias: bool = False, axis: Axis = Axis.HIDDEN) -> tuple[TensorSlot, ...]:
    """The weight of a norm, and its bias if it has one."""
    weight = TensorSlot(f"{name}.weight", (axis,), part, role)
    return (weight, TensorSlot(f"{name}.bias", (axis,), part, f"{role}_bias")) if bias else (weight,)


def linear(
    name: str, role: str, part: Part, rows: Axis | tuple[Axis, ...], columns: Axis, bias_when: str | None = None
) -> tuple[TensorSlot, ...]:
    """The weight of a linear layer (rows are outputs, as torch stores it), and its bias where a flag adds one."""
    weight = TensorSlot(f"{name}.weight", (rows, columns), part, role)
    if bias_when is None:
        return (weight,)
    return weight, TensorSlot(f"{name}.bias", (rows,), part, f"{role}_bias", bias_when)
