"""GGUF files: what transformers reads from them, and what it leaves out."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .location import Location


@lru_cache(maxsize=1)
def gguf_config(location: Location) -> Mapping[str, Any]:
    """What transformers makes of a GGUF's header; it takes seconds."""
    from transformers import AutoConfig

    with quiet_transformers():
        return dict(AutoConfig.from_pretrained(location.folder, gguf_file=location.file).to_dict())


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


#: What a GGUF calls its pre-tokenizer and transformers' converter leaves out. SmolLM splits every digit off
#: before the byte-level expression sees the text (its tokenizer.json: Digits, then ByteLevel).
_PRE_TOKENIZERS: dict[str, list[Mapping[str, Any]]] = {
    "smollm": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ]
}


def restore_pre_tokenizer(content: dict[str, Any], location: Location) -> None:
    """Put the pre-tokenizer into a ``tokenizer.json`` that transformers made without it."""
    field = _reader(location).fields.get("tokenizer.ggml.pre")
    name = field.contents() if field else None
    if name in _PRE_TOKENIZERS:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[name]}


@lru_cache(maxsize=1)
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
