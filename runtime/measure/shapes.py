"""Shapes to measure without any weights at hand: published models, and what cuts would leave of them.

Speed does not depend on what the numbers are, so random weights of the right shapes tell what a cut would buy before
anything is pruned. What it would cost in quality they cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from flabc.errors import UnknownNameError, UsageError
from flabc.frozen import Frozen
from flabc.spec import LayerSpec, ModelSpec

#: Published models, as their ``config.json`` has them (Qwen, Meta: Hugging Face).
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-coder-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "qwen2.5-coder-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "qwen2.5-coder-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
    },
    "codellama-7b": {
        "model_type": "llama",
        "vocab_size": 32016,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    "llama-2-70b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    # For tests, and to see that everything works: milliseconds on any machine.
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}


class Cut(Frozen):
    """How a shape is cut, in this order: vocabulary, then heads and FFN channels down to the share.

    Args:
        share: of all parameters, what goes.
        vocab_size: rows that the vocabulary keeps at most.
        spread: how far the rates of single layers lie from their mean, as a share of it: the first layer is cut least,
            the last most. 0 cuts all layers alike.
        heads: whether heads go too, by whole KV groups; else FFN channels alone.
        multiple_of: what the FFN's width is a multiple of, so that products run at full speed.
    """

    share: float = Field(gt=0, lt=1)
    vocab_size: int | None = Field(None, ge=1)
    spread: float = Field(0.0, ge=0, le=1)
    heads: bool = True
    multiple_of: int = Field(128, ge=1)


#: Cuts by name: those of the recipes (of Qwen2.5-Coder-0.5B's vocabulary they keep so many rows; smaller ones stay),
#: and Self-Pruner's LLaMA-2-70B to 49B and 35B, by layers that are equal and by layers that are not.
CUTS = {
    "flab-22": Cut(share=0.22, vocab_size=31_104, heads=False),
    "flab-35": Cut(share=0.35, vocab_size=27_392, heads=False),
    "flab-50": Cut(share=0.50, vocab_size=27_392, heads=False),
    "self-pruner-49b": Cut(share=0.30),
    "self-pruner-49b-uneven": Cut(share=0.30, spread=0.5),
    "self-pruner-35b": Cut(share=0.50),
    "self-pruner-35b-uneven": Cut(share=0.50, spread=0.5),
}


def shape_named(name: str) -> ModelSpec:
    """The spec of a published model.

    Raises:
        UnknownNameError: if it is not in the registry.
    """
    if name not in SHAPES:
        raise UnknownNameError("shape", name, SHAPES)
    return ModelSpec.from_config(SHAPES[name])


def cut_named(text: str) -> Cut:
    """A cut by name, or a plain one by the share of the parameters that goes, as ``0.3``.

    Raises:
        UnknownNameError: if it is neither.
        UsageError: if the share is not between 0 and 1.
    """
    if text in CUTS:
        return CUTS[text]
    try:
        share = float(text)
    except ValueError:
        raise UnknownNameError("cut", text, CUTS) from None
    if not 0 < share < 1:
        raise UsageError("A cut is a share of the parameters.", expected="between 0 and 1, as 0.3", found=text)
    return Cut(share=share)


def cut_shape(spec: ModelSpec, cut: Cut) -> ModelSpec:
    """What a cut leaves of a shape: as many parameters as it says, as nearly as whole steps come.

    Raises:
        UsageError: if the vocabulary alone takes more, or so much cannot go.
    """
    vocab = min(spec.vocab_size, cut.vocab_size or spec.vocab_size)
    base = spec.model_copy(update={"vocab_size": vocab})
    wanted = (1 - cut.share) * spec.num_parameters
    least = _narrowed(base, 1.0, 1.0, cut)
    if not least.num_parameters <= wanted <= base.num_parameters:
        raise UsageError(
            "The shape cannot be cut so.",
            expected=f"between {least.num_parameters / 1e6:,.1f} M and {base.num_parameters / 1e6:,.1f} M parameters",
            found=f"{wanted / 1e6:,.1f} M",
        )
    # Heads go in large steps: they are settled first, and the FFN makes up for the rest.
    settled = _nearest(lambda rate: _narrowed(base, rate * cut.heads, rate, cut), wanted)[0] * cut.heads
    return _nearest(lambda rate: _narrowed(base, settled, rate, cut), wanted)[1]


def _nearest(make: Callable[[float], ModelSpec], wanted: float) -> tuple[float, ModelSpec]:
    """The rate, and the shape that it makes, with the number of parameters nearest to what is wanted."""
    low, high = 0.0, 1.0
    for _ in range(40):  # parameters fall with the rate, in steps
        middle = (low + high) / 2
        low, high = (middle, high) if make(middle).num_parameters > wanted else (low, middle)
    return min(((rate, make(rate)) for rate in (low, high)), key=lambda pair: abs(pair[1].num_parameters - wanted))


def _narrowed(spec: ModelSpec, heads: float, ffn: float, cut: Cut) -> ModelSpec:
    """Every layer without a share of its KV groups and one of its FFN channels, at least one step of each left."""
    count = len(spec.layers)
    tilts = [1 + cut.spread * (2 * at / max(count - 1, 1) - 1) for at in range(count)]
    layers = (
        _narrower(layer, min(heads * tilt, 1.0), min(ffn * tilt, 1.0), cut.multiple_of)
        for layer, tilt in zip(spec.layers, tilts, strict=True)
    )
    return spec.model_copy(update={"layers": tuple(layers)})


def _narrower(layer: LayerSpec, heads: float, ffn: float, multiple_of: int) -> LayerSpec:
    group = layer.num_attention_heads // max(layer.num_key_value_heads, 1)
    groups = max(round(layer.num_key_value_heads * (1 - heads)), 1) if layer.has_attention else 0
    if not layer.has_ffn:
        return LayerSpec(num_attention_heads=group * groups, num_key_value_heads=groups, intermediate_size=0)
    steps = max(round(layer.intermediate_size * (1 - ffn) / multiple_of), 1)
    width = min(steps * multiple_of, layer.intermediate_size)
    return LayerSpec(num_attention_heads=group * groups, num_key_value_heads=groups, intermediate_size=width)


def sliced(spec: ModelSpec, count: int) -> ModelSpec:
    """Some of the layers, evenly spread over all, for a model that is too large to be measured whole."""
    layers = tuple(spec.layers[int((at + 0.5) * len(spec.layers) / count)] for at in range(count))
    return spec.model_copy(update={"layers": layers})


def layer_bytes(spec: ModelSpec, bytes_per_value: int) -> int:
    """Bytes of the weights inside the layers."""
    return bytes_per_value * sum(sum(parts.values()) for parts in spec.layer_parameters())
