"""Transformers' own modules on a model's weights: one decoder layer at a time, and what stands around the layers.

Nothing of an architecture is computed by code of our own: embedding, masks, rotary positions, layers and norm are
those of the transformers class that the family names.

Letters in shape comments: N sequences, T tokens of each, D hidden_size, V vocab_size.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from flabc.families import Part

from .model import CausalLM

#: Sequences computed at once.
BATCH = 4


class Surround:
    """What is around the layers: it embeds tokens, hands a layer its mask and positions, and reads logits out.

    Args:
        model: the model.
        device: where to compute.
        dtype: in which precision.
    """

    def __init__(self, model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        self._backbones: dict[str, nn.Module] = {}
        self._norm: nn.Module | None = None

    def embed(self, tokens: Tensor) -> Tensor:
        """The hidden states that the first layer receives, (N, T) to (N, T, D)."""
        embedding: Any = self._backbone(0).embed_tokens
        embedding.weight = nn.Parameter(self._moved("embedding"), requires_grad=False)
        key = self.model.family.embedding_multiplier
        hidden: Tensor = embedding(tokens.to(self.device))
        embedding.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # not needed between the layers
        return hidden * self.model.config[key] if key else hidden

    def forward(self, layer: nn.Module, index: int, hidden: Tensor, firsts: int = 0) -> Tensor:
        """One layer over sequences, (N, T, D) to (N, T, D), ``BATCH`` of them at a time.

        Args:
            layer: it.
            index: its number.
            hidden: what it receives, (N, T, D).
            firsts: so many sequences at the end are none: each of their tokens stands alone, at the first position.
        """
        backbone: Any = self._backbone(index)
        backbone.layers = nn.ModuleList([layer])
        texts, alone = hidden[: len(hidden) - firsts], hidden[len(hidden) - firsts :]
        batches = [*texts.split(BATCH), *(each[:, None] for each in alone)]  # type: ignore[no-untyped-call]
        parts = [backbone(inputs_embeds=batch, use_cache=False).last_hidden_state for batch in batches]
        backbone.layers = nn.ModuleList()
        return torch.cat([part.flatten(0, 1) for part in parts]).view_as(hidden)

    def head(self, rows: Tensor | None = None) -> Head:
        """What follows the layers; of the vocabulary's rows only some, if they are given, (n,)."""
        self._backbone(0)  # its norm is the model's, whatever the type of the layer
        norm: Any = self._norm
        weights = {slot.name.rsplit(".", 1)[1]: slot for slot in self.model.family.tensors if slot.part is Part.NORM}
        norm.load_state_dict({name: self._moved(slot.role) for name, slot in weights.items()}, assign=True)
        matrix = self.model.output_matrix if rows is None else self.model.output_matrix[rows]
        return Head(norm.eval(), matrix.to(self.device, self.dtype), self.model)

    def _moved(self, role: str) -> Tensor:
        return self.model.tensor(role).to(self.device, self.dtype)

    def _backbone(self, index: int) -> Any:
        kind = _layer_type(self.model, index)
        if kind not in self._backbones:
            backbone: Any = _backbone_of(self.model, index)
            self._norm = backbone.norm
            backbone.layers, backbone.norm = nn.ModuleList(), nn.Identity()
            if self.model.family.embedding_multiplier:
                backbone.embedding_multiplier = 1.0  # the model applies it on its way in, here each layer is entered
            # Not to the dtype: rotary frequencies are float32 in every model, rounded they point elsewhere.
            self._backbones[kind] = backbone.to(self.device).eval()
        return self._backbones[kind]


class Head:
    """The final norm and the output matrix."""

    def __init__(self, norm: nn.Module, matrix: Tensor, model: CausalLM) -> None:
        self.norm, self.matrix, self.model = norm, matrix, model

    def log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the next token, (n, D) to (n, V), float32."""
        logits = (self.norm(hidden) @ self.matrix.T).float()
        return torch.log_softmax(self.model.family.finished(logits, self.model.config), -1)


def build_layer(
    model: CausalLM, index: int, weights: Mapping[str, Tensor], *, attention: bool = True, ffn: bool = True
) -> nn.Module:
    """Transformers' own decoder layer for one layer of the model, on the given weights, without copying them.

    Args:
        model: the model that the layer belongs to.
        index: which layer.
        weights: the layer's tensors by their names inside the layer.
        attention: whether its attention, if it has one, takes part.
        ffn: whether its FFN, if it has one, takes part.
    """
    shape = model.spec.layers[index]
    present = {Part.ATTENTION: attention and shape.has_attention, Part.FFN: ffn and shape.has_ffn}
    with torch.device("meta"):
        layer: nn.Module = _class(model.family.decoder_layer)(layer_config(model, index), 0)
    for slot in model.family.layer_tensors:
        if not present[slot.part]:
            _silence(layer, slot.name.format(layer=index).split(f".{index}.", 1)[1])
    kept = {name: tensor for name, tensor in weights.items() if name in layer.state_dict()}
    layer.load_state_dict(kept, strict=True, assign=True)
    return layer.eval()


def layer_config(model: CausalLM, index: int, **changes: Any) -> Any:
    """A transformers config of one layer with the shape and the type of layer ``index``."""
    shape = {key: size or 1 for key, size in model.spec.layers[index].model_dump().items()}
    fields = {key: value for key, value in model.config.items() if key not in ("model_type", "transformers_version")}
    kinds = [_layer_type(model, index)] if fields.get("layer_types") else None
    fields |= shape | {"head_dim": model.spec.head_dim, "num_hidden_layers": 1, "layer_types": kinds} | changes
    config = _unchecked(model.spec.family)(**copy.deepcopy(fields))  # it fills nested fields in place
    config._attn_implementation = "eager" if model.family.eager else "sdpa"
    return config


@cache
def _unchecked(family: str) -> Any:
    """The family's config without its check, which allows dense shapes only: not 5 heads of 16 for 96 dimensions."""
    from transformers import CONFIG_MAPPING

    return type("LayerConfig", (CONFIG_MAPPING[family],), {"validate": lambda self: None})


def _backbone_of(model: CausalLM, index: int) -> nn.Module:
    """The family's model with one layer of no size to speak of and one row of embedding."""
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # there is one row
    config = layer_config(model, index, vocab_size=1, intermediate_size=1, **special)
    backbone: nn.Module = _class(model.family.backbone)(config)
    return backbone


def _layer_type(model: CausalLM, index: int) -> str:
    kinds = model.config.get("layer_types")
    return str(kinds[index]) if kinds else ""


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


def _class(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
