"""Mistral: Llama's layer, with attention over a sliding window in some releases."""

from __future__ import annotations

from .family import Family, classes
from .llama import OUTER, layer_tensors

MISTRAL = Family(
    name="mistral", **classes("mistral", "Mistral"), tensors=OUTER, layer_tensors=layer_tensors(None, None, None)
)
