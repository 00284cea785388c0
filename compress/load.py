"""Models in: a Hugging Face folder, a hub id, a GGUF file, or a built-in alias, as one ``CausalLM``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flabc.artifact import SourceRecord, sha256
from flabc.console import progress
from flabc.errors import ModelError
from flabc.families import family_of
from flabc.families.per_layer import MODELING, PER_LAYER, plain_view
from flabc.spec import ModelSpec

from .gguf_file import (
    duplicate_output_cosine,
    gguf_config,
    gguf_weights,
    output_is_more_precise,
    quiet_transformers,
    read_once,
    restore_tokenizer,
)
from .location import Location, locate
from .model import CausalLM, TokenizerFiles, check_weights
from .stored import Weight
from .weight_files import folder_weights, read_json, shards

#: What a config may leave to its family's defaults and flabc reads.
_ASSUMED = (
    *("head_dim", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings", "layer_types"),
    *("rms_norm_eps", "norm_epsilon"),
)

#: Two matrices whose rows point the same way to this degree were one matrix before quantisation.
SAME_MATRIX_COSINE = 0.98


def load(model: str, *, tie: bool = False, stream: bool = False, pickled: bool = False) -> CausalLM:
    """Read a model, in the dtype it is stored in; a GGUF becomes float32.

    Args:
        model: an alias, a folder, a GGUF file or a hub id.
        tie: tie input and output matrices that are one matrix stored twice, keeping the more precise.
        stream: leave safetensors on disk and read each tensor when it is used.
        pickled: read weights that are only there as pickles (``pytorch_model.bin``), with ``weights_only``.

    Raises:
        ModelError: if it cannot be read, is incomplete, or holds numbers that are not finite.
        UnknownNameError: if the name or the family is not known.
    """
    location = locate(model, pickled=pickled)
    with progress(f"reading {model}"):
        loaded = _read(location, stream=stream, pickled=pickled)
        check_weights(loaded)
        return _tied(loaded, location) if tie else loaded


def _read(location: Location, *, stream: bool = False, pickled: bool = False) -> CausalLM:
    config = read_config(location)
    spec = ModelSpec.from_config(config)
    config = plain_view(config)
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    weights: dict[str, Weight] = {}
    if location.gguf:
        weights |= gguf_weights(location.gguf, config)
    else:
        weights |= folder_weights(location.folder, stream=stream, pickled=pickled)
    if spec.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    tokenizer = read_tokenizer(location)
    _check_tokenizer(tokenizer, spec, location)
    return CausalLM(
        spec=spec,
        config=config | {"dtype": _dtype_name(weights)},
        generation_config=_generation_config(location, config),
        tokenizer=tokenizer,
        weights=weights,
        source=SourceRecord(name=location.name, files=source_hashes(location)),
        token_origin=tuple(range(spec.vocab_size)),
        layer_origin=tuple(range(len(spec.layers))),
    )


def read_config(location: Location) -> dict[str, Any]:
    """The model's ``config.json``, or what transformers makes of a GGUF's header.

    Raises:
        ModelError: if ``config.json`` is not JSON.
        UnknownNameError: if the family is not known: before any weight is read.
    """
    if not location.gguf:
        return _completed(read_json(location.folder / "config.json"))
    return dict(gguf_config(location.gguf))


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the sizes and switches that its family's class assumes where the file is silent."""
    from transformers import AutoConfig

    family = family_of(plain_view(config))
    if PER_LAYER in config:  # flabc wrote it: it is complete
        return config
    fields = {key: value for key, value in config.items() if key != "model_type"}
    assumed = AutoConfig.for_model(family.name, **fields).to_dict()
    return {key: assumed[key] for key in (*_ASSUMED, *family.multipliers) if assumed.get(key) is not None} | config


def complete_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder with all that its family's class assumes where the file is silent.

    Raises:
        ModelError: if the family's class does not take the model's shape.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    config = plain_view(read_json(folder / "config.json"))
    family = config.pop("model_type")
    try:
        return dict(AutoConfig.for_model(family, **config).to_dict())
    except StrictDataclassError as error:
        raise ModelError(f"The class that transformers has for {family} does not take this shape: {error}") from error


def read_tokenizer(location: Location) -> TokenizerFiles:
    """The tokenizer's files, as transformers writes them after reading whatever form they had.

    Raises:
        ModelError: if there is none, or it has no ``tokenizer.json`` form.
    """
    from transformers import AutoTokenizer

    arguments = dict(location.arguments)
    if (location.folder / MODELING).is_file() and not location.file:
        # Transformers would ask whether to run the module, to learn no more than what family the tokenizer serves.
        arguments["config"] = _bare_config(plain_view(read_json(location.folder / "config.json")))
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), read_once():
        try:
            tokenizer = AutoTokenizer.from_pretrained(location.folder, **arguments)
        except (OSError, ValueError) as error:
            raise ModelError(f"{location.name} has no tokenizer that transformers can read: {error}") from error
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise ModelError(f"The tokenizer of {location.name} has no fast form.", expected="a tokenizer.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    config = {key: value for key, value in config.items() if key not in ("name_or_path", "is_local", "gguf_file")}
    if location.gguf:
        restore_tokenizer(content, config, location.gguf)
    return TokenizerFiles(content, config, tokenizer.chat_template)


def _bare_config(config: Mapping[str, Any]) -> Any:
    """A config that says its family and nothing else."""
    from transformers import PreTrainedConfig

    return type("Bare", (PreTrainedConfig,), {"model_type": config["model_type"]})()


def _check_tokenizer(files: TokenizerFiles, spec: ModelSpec, location: Location) -> None:
    """A tokenizer may have fewer tokens than the model has rows, which are padded, but never more.

    Raises:
        ModelError: if it gives ids that the model does not have.
    """
    import tokenizers

    largest = max(tokenizers.Tokenizer.from_str(json.dumps(files.tokenizer)).get_vocab(True).values())
    if largest >= spec.vocab_size:
        raise ModelError(
            f"The tokenizer of {location.name} does not match the model.",
            expected=f"ids below vocab_size, {spec.vocab_size}",
            found=f"the id {largest}",
            fix="Get the tokenizer that came with the weights.",
        )


def _generation_config(location: Location, config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's ``generation_config.json``; a GGUF has none, but its header names the special tokens."""
    file = location.folder / "generation_config.json"
    if not location.file:
        return read_json(file) if file.is_file() else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def source_hashes(location: Location) -> dict[str, str]:
    """The sha256 of every file that holds weights."""
    files = [location.gguf] if location.gguf else shards(location.folder, pickled=True)
    return {file.name: sha256(file) for file in files}


def _tied(model: CausalLM, location: Location) -> CausalLM:
    """Tie the matrices of a model that carries one matrix twice.

    Raises:
        ModelError: if there is nothing to tie, or the two matrices are different ones.
    """
    if model.spec.tie_word_embeddings:
        return model
    cosine = duplicate_output_cosine(location.gguf) if location.gguf else None
    if not location.gguf or cosine is None or cosine < SAME_MATRIX_COSINE:
        raise ModelError(
            f"{location.name} cannot be tied: its input and output matrices are not one matrix stored twice.",
            expected=f"a GGUF with both, rows alike to a cosine of {SAME_MATRIX_COSINE}",
            found="no GGUF with both" if cosine is None else f"cosine {cosine:.3f}",
            fix="Leave --tie away.",
        )
    weights = dict(model.weights)
    head = weights.pop("lm_head.weight")
    if output_is_more_precise(location.gguf):
        weights["model.embed_tokens.weight"] = head
    return replace(
        model,
        spec=model.spec.model_copy(update={"tie_word_embeddings": True}),
        config={**model.config, "tie_word_embeddings": True},
        weights=weights,
    )


def _dtype_name(weights: Mapping[str, Weight]) -> str:
    return str(next(iter(weights.values())).dtype).removeprefix("torch.")
