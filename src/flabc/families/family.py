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
        axes: the space of each axis, in the order of the tensor's shape.
        part: what it belongs to; a norm goes with the sub-block that it feeds.
        role: how the export graph calls it, e.g. ``q`` or ``q_bias``.
        when: a config key that must be true for the tensor to exist, or None if it always does.
    """

    name: str
    axes: tuple[Axis, ...]
    part: Part
    role: str
    when: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Args:
        name: ``model_type`` in Hugging Face's config.
        architecture: the transformers class that loads a checkpoint of the family.
        decoder_layer: the transformers class of one layer, as ``module:Class``.
        rotary: the transformers class that makes cos and sin, as ``module:Class``.
        tensors: the tensors outside the layers.
        layer_tensors: the tensors of one layer.
        defaults: config values that transformers assumes when the file does not say.
        requires: config keys whose value must be one of those listed (the first is assumed if absent).
    """

    name: str
    architecture: str
    decoder_layer: str
    rotary: str
    tensors: tuple[TensorSlot, ...]
    layer_tensors: tuple[TensorSlot, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def flag(self, config: Mapping[str, Any], key: str) -> bool:
        """Whether a config switches a kind of tensor on, with the family's default where it is silent."""
        return bool(config.get(key, self.defaults.get(key, False)))


def linear(
    name: str, role: str, part: Part, rows: Axis, columns: Axis, bias_when: str | None = None
) -> tuple[TensorSlot, ...]:
    """The weight of a linear layer (rows are outputs, as torch stores it), and its bias where a flag adds one."""
    weight = TensorSlot(f"{name}.weight", (rows, columns), part, role)
    if bias_when is None:
        return (weight,)
    return weight, TensorSlot(f"{name}.bias", (rows,), part, f"{role}_bias", bias_when)
