"""CausalLM: a model as compress sees it, and the exact surgery on its tensors.

Letters in shape comments: N sequences, T tokens of each, D hidden_size, V vocab_size, F intermediate_size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flabc.artifact import SourceRecord
from flabc.errors import ModelError
from flabc.families import Axis, Family, Part, TensorSlot, family_named
from flabc.spec import LayerSpec, ModelSpec

from .stored import Weight, loaded


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as its files say it.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        config: the content of ``tokenizer_config.json``.
        chat_template: the Jinja template, or None.
    """

    tokenizer: Mapping[str, Any]
    config: Mapping[str, Any]
    chat_template: str | None = None


@dataclass(frozen=True)
class CausalLM:
    """A decoder model: shapes, config, tensors by checkpoint name, tokenizer. Never changed in place.

    ``token_origin`` and ``layer_origin`` say which row and which layer of the dense model each one was.
    """

    spec: ModelSpec
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: TokenizerFiles
    weights: Mapping[str, Weight]
    source: SourceRecord
    token_origin: tuple[int, ...]
    layer_origin: tuple[int, ...]

    @property
    def family(self) -> Family:
        """The architecture family."""
        return family_named(self.spec.family)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are kept."""
        return next(iter(self.weights.values())).dtype

    def tensor(self, role: str, layer: int | None = None) -> Tensor:
        """The tensor that plays ``role`` (a ``TensorSlot.role``), in a layer if it belongs to one."""
        return loaded(self.weights[self.name(role, layer)])

    def name(self, role: str, layer: int | None = None) -> str:
        """The checkpoint name of the tensor that plays ``role``."""
        slots = self.family.tensors if layer is None else self.family.layer_tensors
        return next(slot for slot in slots if slot.role == role).name.format(layer=layer)

    @staticmethod
    def layer_prefix(layer: int) -> str:
        """What the checkpoint names of a layer's tensors begin with."""
        return f"model.layers.{layer}."

    def inner_name(self, role: str, layer: int) -> str:
        """The name, inside its layer, of the tensor that plays ``role`` (``mlp.down_proj.weight``)."""
        return self.name(role, layer).removeprefix(self.layer_prefix(layer))

    @property
    def output_matrix(self) -> Tensor:
        """The matrix that turns hidden states into logits, (V, D): the embedding where it is tied."""
        return self.tensor("embedding" if self.spec.tie_word_embeddings else "head")

    def layer_weights(self, layer: int) -> dict[str, Tensor]:
        """One layer's tensors, by their names inside the layer (``self_attn.q_proj.weight``)."""
        prefix = self.layer_prefix(layer)
        return {name.removeprefix(prefix): loaded(t) for name, t in self.weights.items() if name.startswith(prefix)}


def check_weights(model: CausalLM, *, stored: bool = True) -> None:
    """Make sure that the tensors are those that the spec says, of its shapes, and finite.

    Args:
        model: the model.
        stored: look into tensors on disk too; once is enough, surgery only selects from them.

    Raises:
        ModelError: naming the first tensor that is missing, has another shape, or holds NaN or infinity.
    """
    for name, shape in model.spec.shapes().items():
        if name not in model.weights:
            raise ModelError(f"The model has no tensor {name!r}.", expected=f"shape {shape}")
        tensor = model.weights[name]
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"Tensor {name!r} has the wrong shape.", expected=str(shape), found=str(tuple(tensor.shape))
            )
        if (stored or isinstance(tensor, Tensor)) and not torch.isfinite(loaded(tensor)).all():
            raise ModelError(f"Tensor {name!r} holds NaN or infinity.", fix="Get an undamaged copy of the model.")


def cut_vocab(model: CausalLM, keep: Sequence[int]) -> CausalLM:
    """Keep these rows of the embedding and the output matrix, in this order. The tokenizer is the caller's."""
    weights = dict(model.weights)
    _take(weights, model.family.tensors, {Axis.VOCAB: keep}, None, model.spec)
    spec = model.spec.model_copy(update={"vocab_size": len(keep)})
    return replace(model, spec=spec, weights=weights, token_origin=tuple(model.token_origin[old] for old in keep))


def cut_layers(model: CausalLM, keep: Sequence[int]) -> CausalLM:
    """Keep these layers, in this order, numbered anew."""
    inner = {name: t for name, t in model.weights.items() if ".layers." not in name}
    for new, old in enumerate(keep):
        before, after = f"model.layers.{old}.", f"model.layers.{new}."
        inner |= {after + n.removeprefix(before): t for n, t in model.weights.items() if n.startswith(before)}
    layers = tuple(model.spec.layers[old] for old in keep)
    spec = model.spec.model_copy(update={"layers": layers})
    config = dict(model.config)
    if config.get("layer_types"):  # which layers look through a window goes with the layers
        config["layer_types"] = [config["layer_types"][old] for old in keep]
    origin = tuple(model.layer_origin[old] for old in keep)
    return replace(model, spec=spec, config=config, weights=inner, layer_origin=origin)


def cut_sub_blocks(model: CausalLM, attention: Collection[int] = (), ffn: Collection[int] = ()) -> CausalLM:
    """Remove the attention of some layers and the FFN of others, each with the norm before it; the numbers stay."""
    weights, layers = dict(model.weights), list(model.spec.layers)
    for layer in attention:
        layers[layer] = _resized(layers[layer], num_attention_heads=0, num_key_value_heads=0)
    for layer in ffn:
        layers[layer] = _resized(layers[layer], intermediate_size=0)
    for part, gone in ((Part.ATTENTION, attention), (Part.FFN, ffn)):
        for slot in model.family.layer_tensors:
            for layer in gone if slot.part is part else ():
                weights.pop(slot.name.format(layer=layer), None)
    return replace(model, spec=model.spec.model_copy(update={"layers": tuple(layers)}), weights=weights)


def cut_channels(model: CausalLM, keep: Mapping[int, Sequence[int]]) -> CausalLM:
    """Keep these FFN channels of each layer named, in this order; exact for all that is kept."""
    weights, layers = dict(model.weights), list(model.spec.layers)
    for layer, channels in keep.items():
        _take(weights, model.family.layer_tensors, {Axis.INTERMEDIATE: channels}, layer, model.spec)
        layers[layer] = _resized(layers[layer], intermediate_size=len(channels))
    return replace(model, spec=model.spec.model_copy(update={"layers": tuple(layers)}), weights=weights)


def cut_heads(model: CausalLM, keep: Mapping[int, Sequence[int]]) -> CausalLM:
    """Keep these KV groups of each layer named, each with its query heads, in this order; exact for what stays."""
    weights, layers, size = dict(model.weights), list(model.spec.layers), model.spec.head_dim
    for layer, groups in keep.items():
        group = layers[layer].num_attention_heads // layers[layer].num_key_value_heads
        rows = {
            space: [at * width + offset for at in groups for offset in range(width)]
            for space, width in ((Axis.KV, size), (Axis.QUERY, group * size))
        }
        _take(weights, model.family.layer_tensors, rows, layer, model.spec)
        heads = {"num_attention_heads": group * len(groups), "num_key_value_heads": len(groups)}
        layers[layer] = _resized(layers[layer], **heads)
    return replace(model, spec=model.spec.model_copy(update={"layers": tuple(layers)}), weights=weights)


def _resized(layer: LayerSpec, **sizes: int) -> LayerSpec:
    return LayerSpec(**{**layer.model_dump(), **sizes})


def _take(
    weights: dict[str, Weight],
    slots: Sequence[TensorSlot],
    keep: Mapping[Axis, Sequence[int]],
    layer: int | None,
    spec: ModelSpec,
) -> None:
    """Select along every axis that lies in one of the spaces of ``keep``, in every tensor that has one.

    Args:
        weights: changed in place.
        slots: the tensors.
        keep: indices to keep, by space.
        layer: the layer that the tensors belong to, if any.
        spec: the shapes before the cut.
    """
    for slot in slots:
        name = slot.name.format(layer=layer)
        for at in range(len(slot.axes)):
            if name in weights and keep.keys() & set(slot.segments(at)):
                index = torch.as_tensor(_places(slot.segments(at), keep, layer, spec), dtype=torch.long)
                weights[name] = weights[name].index_select(at, index)


def _places(
    segments: Sequence[Axis], keep: Mapping[Axis, Sequence[int]], layer: int | None, spec: ModelSpec
) -> list[int]:
    """Indices along an axis made of segments."""
    places, begin = list[int](), 0
    for space in segments:
        size = spec.axis_size(space, None if layer is None else spec.layers[layer])
        places += (begin + index for index in keep.get(space, range(size)))
        begin += size
    return places
