"""Qwen2, Qwen2.5 and Qwen2.5-Coder: Llama's layer with biases on query, key and value."""

from __future__ import annotations

from .family import Family
from .llama import OUTER, layer_tensors

QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    decoder_layer="transformers.models.qwen2.modeling_qwen2:Qwen2DecoderLayer",
    rotary="transformers.models.qwen2.modeling_qwen2:Qwen2RotaryEmbedding",
    tensors=OUTER,
    layer_tensors=layer_tensors("qkv_bias", None, None),
    # The flag is ours: in this family the three biases are part of the architecture, not of the config.
    defaults={"qkv_bias": True},
    requires={"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
