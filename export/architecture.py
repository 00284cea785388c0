"""What the graph has to know of a model beyond its shapes, read from its config by what its family says.

The rotary tables are transformers' own: every family's module computes its frequencies, scaled or not.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from flabc.errors import ModelError, UnknownNameError, require
from flabc.families import Family, family_named
from flabc.families.per_layer import plain_view
from flabc.spec import ModelSpec

from .weights import Array

#: Activations that the graph can spell, by Hugging Face's names.
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")

#: Kinds of rotary positions whose frequencies stay the same however long a text is.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

#: The type of layer that looks through a window.
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class Rotary:
    """The angles by which positions turn queries and keys.

    Args:
        frequencies: radians per position, (R / 2,), where the first R numbers of a head are turned.
        scale: what cosines and sines are multiplied by.
    """

    frequencies: Array
    scale: float = 1.0

    def tables(self, positions: int) -> tuple[Array, Array]:
        """Cosines and sines of every position, (positions, R / 2) each (RoFormer, Su et al., 2021)."""
        angles = np.outer(np.arange(positions, dtype=np.float32), self.frequencies)
        return np.cos(angles) * np.float32(self.scale), np.sin(angles) * np.float32(self.scale)


@dataclass(frozen=True)
class Architecture:
    """How a model computes, beyond its shapes.

    Args:
        family: the architecture family.
        activation: of the FFN, one of ``ACTIVATIONS``.
        layer_types: the type of each layer; it says which window and which rotary positions count.
        windows: how far back each type of layer looks, its own token included; None for all the way.
        rotary: the rotary positions of each type of layer.
        attention_scale: what attention scores are multiplied by.
        attention_softcap: the bound that they are bent to, or None.
        embedding_scale: what embedded tokens are multiplied by.
        output_scale: what each sub-block's output is multiplied by.
        logits_scale: what logits are multiplied by.
        logits_softcap: the bound that they are bent to, or None.
        layer_norm: whether norms are LayerNorms, with a bias, instead of RMSNorms.
    """

    family: Family
    activation: str
    layer_types: tuple[str, ...]
    windows: Mapping[str, int | None]
    rotary: Mapping[str, Rotary]
    attention_scale: float
    attention_softcap: float | None = None
    embedding_scale: float = 1.0
    output_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    layer_norm: bool = False

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return self.family.has("gate") or self.family.has("gate_up")


def architecture(spec: ModelSpec, config: Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face config.

    Args:
        spec: the model's shapes.
        config: the content of ``config.json``; of a model whose layers differ, too.

    Raises:
        ModelError: if the positions are of a kind that the graph cannot spell.
        UnknownNameError: if the activation is.
    """
    require("transformers", "compress")
    family, parsed = family_named(spec.family), _parsed(spec, config)
    activation = str(getattr(parsed, family.activation))
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation", activation, ACTIVATIONS)

    def value(key: str | None, default: float | None = None) -> Any:
        return default if key is None else getattr(parsed, key, default)

    kinds = tuple(getattr(parsed, "layer_types", None) or ()) or (SLIDING,) * len(spec.layers)
    window = getattr(parsed, "sliding_window", None)
    scale = value(family.attention_multiplier) or value(family.query_scalar, spec.head_dim) ** -0.5
    return Architecture(
        family=family,
        activation=activation,
        layer_types=kinds,
        windows={kind: window if kind == SLIDING else None for kind in kinds},
        rotary=_rotary(family, parsed, kinds),
        attention_scale=float(scale),
        attention_softcap=value(family.attention_softcapping),
        embedding_scale=sqrt(spec.hidden_size) if family.embedding_root else value(family.embedding_multiplier, 1.0),
        output_scale=value(family.output_multiplier, 1.0),
        logits_scale=1 / value(family.logits_scaling, 1.0),
        logits_softcap=value(family.logits_softcapping),
        layer_norm=family.has("final_norm_bias"),
    )


def _parsed(spec: ModelSpec, config: Mapping[str, Any]) -> Any:
    """The family's own config object, which knows every default; not its check, which allows dense shapes only."""
    from transformers import CONFIG_MAPPING

    fields = {key: value for key, value in plain_view(config).items() if key not in ("model_type", "architectures")}
    fields |= {"head_dim": spec.head_dim, "num_hidden_layers": len(spec.layers)}
    for heads in ("num_attention_heads", "num_key_value_heads"):  # 0 if no layer attends, and some divide by them
        fields[heads] = fields.get(heads) or 1
    unchecked: Any = type("LayerConfig", (CONFIG_MAPPING[spec.family],), {"validate": lambda self: None})
    return unchecked(**fields)


def _rotary(family: Family, config: Any, kinds: tuple[str, ...]) -> dict[str, Rotary]:
    """What the family's own module computes, for each type of layer.

    Raises:
        ModelError: if frequencies depend on the length of a text.
    """
    parameters = config.rope_parameters
    for kind in {str(each["rope_type"]) for each in (parameters, *parameters.values()) if _has_type(each)}:
        if kind not in ROPE_TYPES:
            raise ModelError(
                f"flabc cannot export rotary positions of the type {kind!r}.",
                expected=f"one of {', '.join(ROPE_TYPES)}",
                fix="Serve the checkpoint with transformers: it loads there.",
            )
    module, layer = family.decoder_layer.split(":")
    name = layer.replace("DecoderLayer", "RotaryEmbedding")
    made = getattr(importlib.import_module(module), name)(config)

    def of(kind: str) -> Rotary:
        prefix = f"{kind}_" if hasattr(made, f"{kind}_inv_freq") else ""
        frequencies = getattr(made, f"{prefix}inv_freq").float().numpy()
        return Rotary(frequencies, float(getattr(made, f"{prefix}attention_scaling")))

    return {kind: of(kind) for kind in kinds}


def _has_type(parameters: Any) -> bool:
    return isinstance(parameters, Mapping) and "rope_type" in parameters
