"""Qwen3: Llama's layer with a norm on every head of query and key."""

from __future__ import annotations

from .family import Axis, Family, Part, classes, norm
from .llama import ATTENTION, OUTER, layer_tensors

#: One norm for all heads of a layer.
HEAD_NORMS = (
    *norm(f"{ATTENTION}.q_norm", "q_norm", Part.ATTENTION, axis=Axis.HEAD),
    *norm(f"{ATTENTION}.k_norm", "k_norm", Part.ATTENTION, axis=Axis.HEAD),
)

QWEN3 = Family(
    name="qwen3",
    **classes("qwen3", "Qwen3"),
    tensors=OUTER,
    layer_tensors=(*layer_tensors("attention_bias", "attention_bias", None), *HEAD_NORMS),
    defaults={"attention_bias": False},
    requires={"use_sliding_window": (False,)},
)
