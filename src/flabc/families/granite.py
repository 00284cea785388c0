"""Granite: Llama's layer with multipliers on embedding, attention, residuals and logits."""

from __future__ import annotations

from .family import Family, classes
from .llama import OUTER, layer_tensors

GRANITE = Family(
    name="granite",
    **classes("granite", "Granite"),
    tensors=OUTER,
    layer_tensors=layer_tensors("attention_bias", "attention_bias", "mlp_bias"),
    defaults={"attention_bias": False, "mlp_bias": False},
    embedding_multiplier="embedding_multiplier",
    output_multiplier="residual_multiplier",
    logits_scaling="logits_scaling",
    attention_multiplier="attention_multiplier",
)
