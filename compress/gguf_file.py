"""GGUF files: what transformers reads from them, and what it leaves out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import gguf
import numpy as np
import torch
from torch import Tensor

from flabc.pre_tokenizers import PRE_TOKENIZERS

T = TypeVar("T")


def _remembered(function: Callable[[Path], T]) -> Callable[[Path], T]:
    """The last answer is kept for as long as the file stays as it is."""

    @lru_cache(maxsize=1)
    def answer(file: Path, changed_ns: int, size: int) -> T:
        return function(file)

    @wraps(function)
    def remembering(file: Path) -> T:
        found = file.stat()
        return answer(file, found.st_mtime_ns, found.st_size)

    return remembering


@_remembered
def gguf_config(file: Path) -> Mapping[str, Any]:
    """What a GGUF's header says, as a config of transformers; it takes seconds."""
    from transformers import AutoConfig

    with quiet_transformers(), read_once():
        config = dict(AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict())
    return config | _left_out(file, config)


#: Layers of the Gemmas whose attention llama.cpp scales by hidden_size over heads, and no other by its layers' count
#: (``load_arch_hparams`` of its ``gemma2.cpp`` and ``gemma3.cpp``).
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def _left_out(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' reader leaves at its defaults though the header, or llama.cpp's code, says otherwise."""
    arch = str(_value(file, "general.architecture"))
    found: dict[str, Any] = {"rope_parameters": _rope(file, arch, config)}
    for key in ("bos", "eos", "padding"):  # some families' defaults are ids of a vocabulary that this model lacks
        found[f"{key.removesuffix('ding')}_token_id"] = _value(file, f"tokenizer.ggml.{key}_token_id")
    if (head_dim := _value(file, f"{arch}.attention.key_length")) is not None:
        found["head_dim"] = head_dim
    if arch == "llama":
        tensors = {tensor.name for tensor in _reader(file).tensors}
        found["attention_bias"] = {"blk.0.attn_q.bias", "blk.0.attn_output.bias"} <= tensors
        found["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if arch in _GEMMA_27B:
        found |= _gemma(file, arch, {**config, **found})
    return found


def _gemma(file: Path, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the Gemmas scale and bound what they compute."""
    wide = config["num_hidden_layers"] == _GEMMA_27B[arch]
    found = {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := _value(file, f"{arch}.{key}")) is not None:
            found[key] = cap
    return found


def _rope(file: Path, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary base, and how positions are scaled."""
    rope = dict(config["rope_parameters"])
    theta = _value(file, f"{arch}.rope.freq_base")
    if "full_attention" in rope:  # by type of layer
        bases = {"full_attention": theta, "sliding_attention": _value(file, f"{arch}.rope.freq_base_swa")}
        return {kind: rope[kind] | ({} if base is None else {"rope_theta": base}) for kind, base in bases.items()}
    if theta is not None:
        rope["rope_theta"] = theta
    if _value(file, f"{arch}.rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": _value(file, f"{arch}.rope.scaling.factor")}
    factors = next((tensor.data for tensor in _reader(file).tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        # Llama 3's scaling is stored as what it divides each frequency by; LongRoPE is how transformers takes such.
        divisors = [float(factor) for factor in factors]
        rope |= {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0}
        rope |= {"attention_factor": 1.0, "original_max_position_embeddings": config["max_position_embeddings"]}
    return rope


def gguf_weights(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a GGUF under Hugging Face's names, dequantised by transformers' own loader."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers(), read_once():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=AutoConfig.for_model(**config),
            dtype=torch.float32,
        )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def duplicate_output_cosine(file: Path) -> float | None:
    """How alike a GGUF's input embedding and output matrix are: None if it has only one of them.

    Returns:
        the mean cosine of matching rows, over 256 rows spread over the vocabulary.
    """
    tensors = {tensor.name: tensor for tensor in _reader(file).tensors}
    if "output.weight" not in tensors or "token_embd.weight" not in tensors:
        return None
    embedding, output = (_rows(tensors[name], 256) for name in ("token_embd.weight", "output.weight"))
    return float(torch.nn.functional.cosine_similarity(embedding, output, dim=1).mean())


def output_is_more_precise(file: Path) -> bool:
    """Whether a GGUF gives its output matrix more bytes than its input embedding, which has as many numbers."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in _reader(file).tensors}
    return sizes["output.weight"] > sizes["token_embd.weight"]


def restore_tokenizer(content: dict[str, Any], config: dict[str, Any], file: Path) -> None:
    """Mend a ``tokenizer.json``, and its config, that transformers made of a GGUF.

    It knows a few ways of splitting text only: SmolLM splits every digit off before the byte-level expression sees the
    text, DeepSeek-Coder uses several expressions, Llama 3 takes whole words without asking the merges. And its classes
    add the special tokens that their family had where the file has none.
    """
    known = PRE_TOKENIZERS.get(str(_value(file, "tokenizer.ggml.pre")))
    if known is not None and _value(file, "tokenizer.ggml.model") == "gpt2":
        content["pre_tokenizer"] = known.as_json()
        content["model"]["ignore_merges"] = known.ignore_merges
    size = len(_reader(file).fields["tokenizer.ggml.tokens"].data)
    foreign = {entry["content"] for entry in content["added_tokens"] if entry["id"] >= size}
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in foreign]
    for key in [key for key, value in config.items() if isinstance(value, str) and value in foreign]:
        del config[key]


def _value(file: Path, key: str) -> Any:
    """A value of a GGUF's header; None if it has none of that name."""
    field = _reader(file).fields.get(key)
    return field.contents() if field else None


class _Reader(gguf.GGUFReader):
    """gguf's reader over an ordinary array: a header is hundreds of thousands of slices, which are slow of a memmap."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, np.asarray(value) if name == "data" else value)  # still mapped, not read


@_remembered
def _reader(file: Path) -> _Reader:
    return _Reader(file)


@contextmanager
def read_once() -> Iterator[None]:
    """Transformers takes a GGUF's header from the reader that flabc keeps.

    It parses the file anew for config, tokenizer and weights, seconds each for a large vocabulary, and has gguf list
    the names of all tensors for every module of a model.
    """
    package: Any = gguf
    theirs = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader = lambda file: _reader(Path(file))
    package.get_tensor_name_map = lru_cache(package.get_tensor_name_map)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = theirs


def _rows(tensor: Any, count: int) -> Tensor:
    picked = tensor.data[:: max(1, tensor.data.shape[0] // count)][:count]
    return torch.from_numpy(gguf.dequantize(picked, tensor.tensor_type).copy())


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
