"""Models out: a Hugging Face folder, safetensors only."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flabc.console import progress
from flabc.families.per_layer import MODELING, PER_LAYER, modeling_code
from flabc.spec import ModelSpec

from .model import CausalLM
from .stored import loaded

#: Bytes of one file of weights at most: it is in memory while it is written.
SHARD_BYTES = 2 * 10**9

#: Which row of the dense model each row was: position is the new id. The file is there if rows were cut.
VOCAB_MAP = "vocab_map.json"

#: Config keys by which transformers derives what each layer is from its number: layers that are cut keep no number.
_BY_NUMBER = ("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern")


def write(model: CausalLM, folder: Path) -> None:
    """Write config, generation config, tokenizer and weights, in the dtype the model has.

    If all layers are equal and whole, and of a shape that the family's config allows, the folder is one of the family,
    which loads anywhere. If not, it carries the module that builds it, which transformers runs if it is told
    ``trust_remote_code``.
    """
    config = config_of(model)
    _write_json(folder / "config.json", config)
    if PER_LAYER in config:
        (folder / MODELING).write_text(modeling_code(model.family), encoding="utf-8")
    if model.generation_config:
        _write_json(folder / "generation_config.json", model.generation_config)
    write_tokenizer(model, folder)
    if model.token_origin != tuple(range(model.spec.vocab_size)):
        (folder / VOCAB_MAP).write_text(json.dumps(model.token_origin) + "\n", encoding="utf-8")
    write_weights(model, folder)


def read_vocab_map(folder: Path) -> tuple[int, ...] | None:
    """The id that each of a checkpoint's or engine's tokens had in its source model; None if they are the same."""
    file = folder / VOCAB_MAP
    return tuple(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def write_weights(model: CausalLM, folder: Path) -> None:
    """Write the weights as safetensors, one shard in memory at a time, and the index if there are several."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    weights = {name: model.weights[name] for name in model.spec.shapes()}
    plan = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: weight.numel() * weight.dtype.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    with progress("writing weights", len(weights)) as advance:
        for file, names in plan.filename_to_tensors.items():
            shard = {name: loaded(weights[name]).contiguous() for name in names}
            save_file(shard, folder / file, metadata={"format": "pt"})
            # The writer makes its files readable by their owner alone; a server may run as somebody else.
            (folder / file).chmod((folder / "config.json").stat().st_mode)
            advance(len(names))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)


def write_tokenizer(model: CausalLM, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the chat template."""
    _write_json(folder / "tokenizer.json", model.tokenizer.tokenizer)
    _write_json(folder / "tokenizer_config.json", model.tokenizer.config)
    if model.tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(model.tokenizer.chat_template, encoding="utf-8")


def config_of(model: CausalLM) -> dict[str, Any]:
    """The config of the model's shapes; ``ModelSpec.from_config`` reads the same spec back."""
    config = {key: value for key, value in model.config.items() if key not in _BY_NUMBER}
    if set(config.get("layer_types") or ()) <= {"full_attention"} and not config.get("sliding_window"):
        # Says nothing, and older versions of transformers do not know it. Where there is a window it does: without it
        # Gemma's layers get their type from their number, and those that looked all the way back no longer do.
        config.pop("layer_types", None)
    config |= {"architectures": [model.family.architecture]}
    config |= model.spec.config_fields(
        native=model.spec.is_uniform and _is_allowed(config | model.spec.config_fields())
    )
    assert ModelSpec.from_config(config) == model.spec
    return config


def _is_allowed(config: Mapping[str, Any]) -> bool:
    """Whether transformers accepts a plain config of its family: some want heads to divide hidden_size."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**copy.deepcopy(dict(config)))
    except StrictDataclassError:
        return False
    return True


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
