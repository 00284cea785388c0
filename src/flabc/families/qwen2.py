"""Qwen2, Qwen2.5, Qwen2.5-Coder and CodeQwen1.5: Llama's layer with biases on query, key and value."""

from __future__ import annotations

from .family import Family, classes
from .llama import OUTER, layer_tensors

QWEN2 = Family(
    name="qwen2",
    **classes("qwen2", "Qwen2"),
    tensors=OUTER,
    layer_tensors=layer_tensors("qkv_bias", None, None),
    # The flag is ours: in this family the three biases are part of the architecture, not of the config.
    defaults={"qkv_bias": True},
    requires={"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
