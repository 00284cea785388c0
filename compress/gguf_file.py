"""GGUF files: what transformers reads from them, and what it leaves out."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from flabc.pre_tokenizers import PRE_TOKENIZERS

from .location import Location

T = TypeVar("T")


def _remembered(function: Callable[[Location], T]) -> Callable[[Location], T]:
    """The last answer is kept for as long as the file stays as it is."""

    @lru_cache(maxsize=1)
    def answer(location: Location, changed_ns: int, size: int) -> T:
        return function(location)

    @wraps(function)
    def remembering(location: Location) -> T:
        found = (location.folder / str(location.file)).stat()
        return answer(location, found.st_mtime_ns, found.st_size)

    return remembering


@_remembered
def gguf_config(location: Location) -> Mapping[str, Any]:
    """What a GGUF's header says, as a config of transformers; it takes seconds."""
    from transformers import AutoConfig

    with quiet_transformers():
        config = dict(AutoConfig.from_pretrained(location.folder, gguf_file=location.file).to_dict())
    return config | _left_out(location, config)


#: Layers of the Gemmas whose attention llama.cpp scales by hidden_size over heads, and no other by its layers' count
#: (``load_arch_hparams`` of its ``gemma2.cpp`` and ``gemma3.cpp``).
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}


def _left_out(location: Location, config: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' reader leaves at its defaults though the header, or llama.cpp's code, says otherwise."""
    arch = str(_value(location, "general.architecture"))
    found: dict[str, Any] = {"rope_parameters": _rope(location, arch, config)}
    for key in ("bos", "eos", "padding"):  # some families' defaults are ids of a vocabulary that this model lacks
        found[f"{key.removesuffix('ding')}_token_id"] = _value(location, f"tokenizer.ggml.{key}_token_id")
    if (head_dim := _value(location, f"{arch}.attention.key_length")) is not None:
        found["head_dim"] = head_dim
    if arch == "llama":
        tensors = {tensor.name for tensor in _reader(location).tensors}
        found["attention_bias"] = {"blk.0.attn_q.bias", "blk.0.attn_output.bias"} <= tensors
        found["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    if arch in _GEMMA_27B:
        found |= _gemma(location, arch, {**config, **found})
    return found


def _gemma(location: Location, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the Gemmas scale and bound what they compute."""
    wide = config["num_hidden_layers"] == _GEMMA_27B[arch]
    found = {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    }
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := _value(location, f"{arch}.{key}")) is not None:
            found[key] = cap
    return found


def _rope(location: Location, arch: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary base, and how positions are scaled."""
    rope = dict(config["rope_parameters"])
    theta = _value(location, f"{arch}.rope.freq_base")
    if "full_attention" in rope:  # by type of layer
        bases = {"full_attention": theta, "sliding_attention": _value(location, f"{arch}.rope.freq_base_swa")}
        return {kind: rope[kind] | ({} if base is None else {"rope_theta": base}) for kind, base in bases.items()}
    if theta is not None:
        rope["rope_theta"] = theta
    if _value(location, f"{arch}.rope.scaling.type") == "linear":
        rope |= {"rope_type": "linear", "factor": _value(location, f"{arch}.rope.scaling.factor")}
    factors = next((tensor.data for tensor in _reader(location).tensors if tensor.name == "rope_freqs.weight"), None)
    if factors is not None:
        # Llama 3's scaling is stored as what it divides each frequency by; LongRoPE is how transformers takes such.
        divisors = [float(factor) for factor in factors]
        rope |= {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0}
        rope |= {"attention_factor": 1.0, "original_max_position_embeddings": config["max_position_embeddings"]}
    return rope


def gguf_weights(location: Location, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of a GGUF under Hugging Face's names, dequantised by transformers' own loader."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            location.folder,
            gguf_file=location.file,
            config=AutoConfig.for_model(**config),
            dtype=torch.float32,
        )
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def duplicate_output_cosine(location: Location) -> float | None:
    """How alike a GGUF's input embedding and output matrix are: None if it has only one of them.

    Returns:
        the mean cosine of matching rows, over 256 rows spread over the vocabulary.
    """
    if not location.file:
        return None
    tensors = {tensor.name: tensor for tensor in _reader(location).tensors}
    if "output.weight" not in tensors or "token_embd.weight" not in tensors:
        return None
    embedding, output = (_rows(tensors[name], 256) for name in ("token_embd.weight", "output.weight"))
    return float(torch.nn.functional.cosine_similarity(embedding, output, dim=1).mean())


def output_is_more_precise(location: Location) -> bool:
    """Whether a GGUF gives its output matrix more bytes than its input embedding, which has as many numbers."""
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in _reader(location).tensors}
    return sizes["output.weight"] > sizes["token_embd.weight"]


def restore_tokenizer(content: dict[str, Any], config: dict[str, Any], location: Location) -> None:
    """Mend a ``tokenizer.json``, and its config, that transformers made of a GGUF.

    It knows a few ways of splitting text only: SmolLM splits every digit off before the byte-level expression sees the
    text, DeepSeek-Coder uses several expressions, Llama 3 takes whole words without asking the merges. And its classes
    add the special tokens that their family had where the file has none.
    """
    known = PRE_TOKENIZERS.get(str(_value(location, "tokenizer.ggml.pre")))
    if known is not None and _value(location, "tokenizer.ggml.model") == "gpt2":
        content["pre_tokenizer"] = known.as_json()
        content["model"]["ignore_merges"] = known.ignore_merges
    size = len(_reader(location).fields["tokenizer.ggml.tokens"].data)
    foreign = {entry["content"] for entry in content["added_tokens"] if entry["id"] >= size}
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] not in foreign]
    for key in [key for key, value in config.items() if isinstance(value, str) and value in foreign]:
        del config[key]


def _value(location: Location, key: str) -> Any:
    """A value of a GGUF's header; None if it has none of that name."""
    field = _reader(location).fields.get(key)
    return field.contents() if field else None


@_remembered
def _reader(location: Location) -> Any:
    from gguf import GGUFReader

    return GGUFReader(location.folder / str(location.file))


def _rows(tensor: Any, count: int) -> Tensor:
    from gguf import dequantize

    picked = tensor.data[:: max(1, tensor.data.shape[0] // count)][:count]
    return torch.from_numpy(dequantize(picked, tensor.tensor_type).copy())


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
