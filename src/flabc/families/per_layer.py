"""Models whose layers differ in shape: what their config says, and the code by which transformers builds them.

The config has transformers' own field ``per_layer_config``. Transformers 5.23 reads it and then builds equal layers
for Llama and Qwen2, or raises; so the checkpoint carries one small module, made from a template, that builds each
layer in its shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from flabc.errors import EngineError

from .family import Family, Part

#: The module's file in a checkpoint, and the config field that says what differs.
MODELING, PER_LAYER = "modeling_flabc.py", "per_layer_config"

#: ``model_type`` of such a model is this and the family's.
_PREFIX = "flabc_"

#: What such a config has beyond the family's.
_OWN = ("auto_map", "base_model_type", PER_LAYER)


def modeling_code(family: Family) -> str:
    """The source of ``modeling_flabc.py`` for a family; the same for every model of it."""
    import jinja2

    template = resources.files("flabc.families").joinpath(f"{MODELING}.jinja").read_text(encoding="utf-8")
    module, layer = family.decoder_layer.split(":")
    norms = {str(part): _norms(family, part) for part in (Part.ATTENTION, Part.FFN)}
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(module=module, layer=layer, norms=norms, family=family)


def has_own_module(folder: Path, family: Family) -> bool:
    """Whether a model is built by a module in its folder, which is run only if flabc would write the same.

    Raises:
        EngineError: if it is other code.
    """
    file = folder / MODELING
    if not file.is_file():
        return False
    if file.read_text(encoding="utf-8") != modeling_code(family):
        raise EngineError(
            f"{file} is not the module that this version of flabc writes, and is not run.",
            fix="Make the checkpoint again, or load it in transformers if you trust it.",
        )
    return True


def _norms(family: Family, part: Part) -> list[str]:
    """What the norms of a sub-block are called inside the layer."""
    names = (
        slot.name.removeprefix("model.layers.{layer}.").split(".") for slot in family.layer_tensors if slot.part is part
    )
    return list(dict.fromkeys(parts[0] for parts in names if len(parts) == 2))


def per_layer_fields(family: Family, shapes: list[dict[str, int]]) -> dict[str, Any]:
    """What the config of such a model has beyond the family's: one shape per layer, 0 for what is gone."""
    stem = MODELING.removesuffix(".py")
    return {
        "model_type": f"{_PREFIX}{family.name}",
        "base_model_type": family.name,
        "architectures": ["FlabcForCausalLM"],
        "auto_map": {"AutoConfig": f"{stem}.FlabcConfig", "AutoModelForCausalLM": f"{stem}.FlabcForCausalLM"},
        PER_LAYER: {str(index): shape for index, shape in enumerate(shapes)},
    }


def plain_view(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as the family's own: without what flabc added."""
    plain = {key: value for key, value in config.items() if key not in _OWN}
    if "base_model_type" in config and str(config.get("model_type", "")).startswith(_PREFIX):
        plain["model_type"] = config["base_model_type"]
    return plain
