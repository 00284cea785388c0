"""ModelSpec: the shapes of a decoder model, layer by layer, and what they cost.

The one thing that compress, export and runtime all read. It is frozen, knows no framework, and never assumes one
size for the whole model: a pruned model has its own shape in every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

from pydantic import Field, model_validator

from flabc.errors import ModelError
from flabc.families import Axis, Part, TensorSlot, family_named, family_of
from flabc.families.per_layer import PER_LAYER, per_layer_fields, plain_view
from flabc.frozen import Frozen

#: Bytes per parameter; block scales of the integer formats (one float16 per 32 weights) are included.
BYTES_PER_PARAMETER: dict[str, float] = {
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "int8": 1 + 2 / 32,
    "int4": 0.5 + 2 / 32,
}


class LayerSpec(Frozen):
    """The shape of one layer; 0 means that the sub-block is gone."""

    num_attention_heads: int = Field(ge=0)
    num_key_value_heads: int = Field(ge=0)
    intermediate_size: int = Field(ge=0)

    @model_validator(mode="after")
    def _heads_form_groups(self) -> LayerSpec:
        heads, kv = self.num_attention_heads, self.num_key_value_heads
        if (heads == 0) != (kv == 0) or (kv and heads % kv):
            raise ValueError(f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv})")
        return self

    @property
    def has_attention(self) -> bool:
        """Whether the attention sub-block is there."""
        return self.num_attention_heads > 0

    @property
    def has_ffn(self) -> bool:
        """Whether the FFN sub-block is there."""
        return self.intermediate_size > 0


class ModelSpec(Frozen):
    """The shapes of a model.

    ``flags`` holds the family's switches (``qkv_bias`` and the like) as they were resolved from the config.
    """

    family: str
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    tie_word_embeddings: bool
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope_theta: float = Field(gt=0)
    rope_type: str = "default"
    flags: dict[str, bool] = Field({})
    layers: tuple[LayerSpec, ...] = Field(min_length=1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSpec:
        """Read the spec from a Hugging Face ``config.json`` (of transformers 4 or 5).

        Raises:
            UnknownNameError: if the family is not known.
            ModelError: if a size is missing or a feature is not supported.
        """
        differs = config.get(PER_LAYER) or {}
        config = plain_view(config)
        family = family_of(config)
        try:
            heads = int(config["num_attention_heads"])
            shape = {
                "num_attention_heads": heads,
                "num_key_value_heads": int(config.get("num_key_value_heads") or heads),
                "intermediate_size": int(config["intermediate_size"]),
            }
            own = {int(index): layer for index, layer in differs.items()}
            layers = [LayerSpec(**{**shape, **own.get(index, {})}) for index in range(int(config["num_hidden_layers"]))]
            return cls(
                family=family.name,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                max_position_embeddings=config["max_position_embeddings"],
                rms_norm_eps=config[family.norm_eps],
                rope_theta=_rope_theta(config),
                rope_type=_rope_type(config),
                flags={slot.when: family.flag(config, slot.when) for slot in family.layer_tensors if slot.when},
                layers=tuple(layers),
            )
        except KeyError as error:
            raise ModelError(f"The config of this {family.name} model has no {error.args[0]!r}.") from error

    @property
    def is_uniform(self) -> bool:
        """Whether all layers are equal and whole, so that the family's plain config describes the model."""
        first = self.layers[0]
        return first.has_attention and first.has_ffn and all(layer == first for layer in self.layers)

    def shape_of(self, slot: TensorSlot, layer: LayerSpec | None = None) -> tuple[int, ...]:
        """The shape of a tensor; those of a layer need the layer."""
        return tuple(
            sum(self.axis_size(space, layer) for space in slot.segments(axis)) for axis in range(len(slot.axes))
        )

    def axis_size(self, axis: Axis, layer: LayerSpec | None = None) -> int:
        """How long a space is; the spaces of a layer need the layer."""
        shared = {Axis.VOCAB: self.vocab_size, Axis.HIDDEN: self.hidden_size, Axis.HEAD: self.head_dim}
        if axis in shared:
            return shared[axis]
        if layer is None:
            raise ValueError(f"axis {axis} belongs to a layer")
        return {
            Axis.QUERY: layer.num_attention_heads * self.head_dim,
            Axis.KV: layer.num_key_value_heads * self.head_dim,
            Axis.INTERMEDIATE: layer.intermediate_size,
        }[axis]

    def tensors(self) -> Iterator[tuple[TensorSlot, int | None, tuple[int, ...]]]:
        """Yield every tensor that the model has: its slot, its layer (None outside the layers), its shape."""
        family = family_named(self.family)
        for slot in family.tensors:
            if self._has(slot, None):
                yield slot, None, self.shape_of(slot)
        for index, layer in enumerate(self.layers):
            for slot in family.layer_tensors:
                if self._has(slot, layer):
                    yield slot, index, self.shape_of(slot, layer)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by its name in the checkpoint."""
        return {slot.name.format(layer=layer): shape for slot, layer, shape in self.tensors()}

    def parameters(self) -> dict[Part, int]:
        """Parameters by component; a tied output matrix counts once, as the embedding."""
        counts = dict.fromkeys(Part, 0)
        for slot, _, shape in self.tensors():
            counts[slot.part] += prod(shape)
        return counts

    def layer_parameters(self) -> list[dict[Part, int]]:
        """Parameters of each layer by component."""
        counts = [dict.fromkeys(Part, 0) for _ in self.layers]
        for slot, layer, shape in self.tensors():
            if layer is not None:
                counts[layer][slot.part] += prod(shape)
        return counts

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        return sum(self.parameters().values())

    def bytes_at(self, precision: str) -> int:
        """Bytes of the weights when all are stored at ``precision`` (a key of ``BYTES_PER_PARAMETER``)."""
        return round(self.num_parameters * BYTES_PER_PARAMETER[precision])

    def flops_per_token(self, context: int = 0) -> int:
        """Floating-point operations to produce one token after ``context`` cached ones (2 per multiply-add)."""
        matrices = sum(prod(shape) for slot, _, shape in self.tensors() if len(shape) == 2)
        if not self.tie_word_embeddings:  # the input embedding is looked up, not multiplied
            matrices -= self.vocab_size * self.hidden_size
        scores = sum(layer.num_attention_heads for layer in self.layers) * self.head_dim * (context + 1)
        return 2 * matrices + 4 * scores

    def kv_bytes_per_token(self, bytes_per_value: int = 4) -> int:
        """Bytes that one token adds to the KV cache, over all layers."""
        return 2 * self.head_dim * sum(layer.num_key_value_heads for layer in self.layers) * bytes_per_value

    def config_fields(self, *, native: bool | None = None) -> dict[str, Any]:
        """The shape fields of a Hugging Face config for this spec.

        If the layers differ, the sizes of the whole model are the largest ones, and ``per_layer_config`` and the fields
        that lead transformers to flabc's module say the rest.

        Args:
            native: whether the family's own class builds the model; by default if all layers are equal and whole.
        """
        shapes = [layer.model_dump() for layer in self.layers]
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "num_hidden_layers": len(self.layers),
            "tie_word_embeddings": self.tie_word_embeddings,
            **max(self.layers, key=lambda layer: layer.num_attention_heads).model_dump(),
            "intermediate_size": max(layer.intermediate_size for layer in self.layers),
        }
        return (
            fields
            if (self.is_uniform if native is None else native)
            else fields | per_layer_fields(family_named(self.family), shapes)
        )

    def _has(self, slot: TensorSlot, layer: LayerSpec | None) -> bool:
        if slot.when == "untied":
            return not self.tie_word_embeddings
        if layer is not None and slot.part is Part.ATTENTION and not layer.has_attention:
            return False
        if layer is not None and slot.part is Part.FFN and not layer.has_ffn:
            return False
        return slot.when is None or self.flags[slot.when]


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters; transformers 5 keeps them in ``rope_parameters``, for some families by layer type."""
    rope: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    inner: Mapping[str, Any] = rope.get("full_attention", rope)
    return inner


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, of full attention where it differs; transformers 4 keeps it beside ``rope_scaling``."""
    return float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0)))


def _rope_type(config: Mapping[str, Any]) -> str:
    """How positions are scaled, ``default`` if they are not."""
    rope = _rope(config)
    return str(rope.get("rope_type", rope.get("type", "default")))
