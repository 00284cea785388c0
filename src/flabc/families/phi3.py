"""Phi-3 and Phi-4-mini: Llama's layer with query, key and value in one projection, and gate and up in another."""

from __future__ import annotations

from .family import Axis, Family, Part, classes, linear
from .llama import ATTENTION, ATTENTION_NORM, FFN, FFN_NORM, OUTER

PHI3 = Family(
    name="phi3",
    **classes("phi3", "Phi3"),
    tensors=OUTER,
    layer_tensors=(
        *ATTENTION_NORM,
        *linear(f"{ATTENTION}.qkv_proj", "qkv", Part.ATTENTION, (Axis.QUERY, Axis.KV, Axis.KV), Axis.HIDDEN),
        *linear(f"{ATTENTION}.o_proj", "o", Part.ATTENTION, Axis.HIDDEN, Axis.QUERY),
        *FFN_NORM,
        *linear(f"{FFN}.gate_up_proj", "gate_up", Part.FFN, (Axis.INTERMEDIATE, Axis.INTERMEDIATE), Axis.HIDDEN),
        *linear(f"{FFN}.down_proj", "down", Part.FFN, Axis.HIDDEN, Axis.INTERMEDIATE),
    ),
)
