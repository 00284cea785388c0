"""Architecture families as data: which tensors a model has, and which space each of their axes lives in.

Everything that slices, counts, exports or loads a model reads these tables; nothing subclasses them. To add a
family write one file beside this one and list it in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flabc.errors import ModelError, UnknownNameError

from .family import Axis, Family, Part, TensorSlot
from .gemma import GEMMA2, GEMMA3
from .granite import GRANITE
from .llama import LLAMA
from .mistral import MISTRAL
from .phi3 import PHI3
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .starcoder2 import STARCODER2

__all__ = ["FAMILIES", "Axis", "Family", "Part", "TensorSlot", "family_named", "family_of"]

FAMILIES: dict[str, Family] = {
    family.name: family for family in (GEMMA2, GEMMA3, GRANITE, LLAMA, MISTRAL, PHI3, QWEN2, QWEN3, STARCODER2)
}


def family_named(name: str) -> Family:
    """Return the family of that name.

    Raises:
        UnknownNameError: if no family has the name.
    """
    if name not in FAMILIES:
        raise UnknownNameError("family", name, FAMILIES)
    return FAMILIES[name]


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family that a Hugging Face ``config.json`` belongs to.

    Raises:
        UnknownNameError: if its ``model_type`` is none that flabc knows.
        ModelError: if the config has no ``model_type`` or asks for a feature the family does not support.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            "The config has no 'model_type'.", expected="a Hugging Face config.json", found=str(model_type)
        )
    family = family_named(model_type)
    for key, allowed in family.requires.items():
        if config.get(key, allowed[0]) not in allowed:
            raise ModelError(
                f"flabc does not support this variant of {model_type}.",
                expected=f"{key} one of {list(allowed)}",
                found=f"{key}={config[key]!r}",
            )
    return family
