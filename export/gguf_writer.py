"""GGUF, the file of llama.cpp, written from a checkpoint with one tensor in memory at a time.

Names of tensors come from the ``gguf`` package, which is llama.cpp's own. What its loaders want beyond the names is
in ``ARCHITECTURES``, as their sources say it (``src/models/*.cpp``, and ``conversion/*.py`` for the layout).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flabc.console import progress
from flabc.errors import ModelError, require
from flabc.families import TensorSlot
from flabc.spec import ModelSpec

from .gguf_vocabulary import Vocabulary
from .weights import Array, CheckpointWeights

#: The file in a folder that ``flabc export --target gguf`` makes.
FILE = "model.gguf"

#: How matrices are stored, as the gguf package calls it; norms and biases are always float32. The first is the default.
PRECISIONS = {"fp16": "F16", "fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}

#: Largest difference that rounding may make to a logit, relative to the largest logit.
ROUNDING = {"fp16": 0.02, "bf16": 0.1, "int8": 0.1}


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's loader of an architecture takes and assumes.

    Args:
        name: ``general.architecture``.
        activation: the FFN's activation, which is not stored.
        ropes: the ways of scaling rotary positions that it computes.
        flags: the family's flags that may be on, and those that must be.
        fills_hidden: whether it wants the query heads to be as wide together as ``hidden_size``.
        interleaved: whether it rotates neighbours, and so wants rows of query and key in another order.
        gemma: whether it is one of Gemma's: norms stored plus one, tied matrices, windows in a fixed pattern.
        period: of so many layers the last attends to everything, the others through a window; 0 if none does.
        wide_layers: the number of layers by which it takes a Gemma for the 27B model and scales attention otherwise.
    """

    name: str
    activation: str
    ropes: tuple[str, ...] = ("default",)
    flags: frozenset[str] = frozenset()
    required_flags: frozenset[str] = frozenset()
    fills_hidden: bool = False
    interleaved: bool = False
    gemma: bool = False
    period: int = 0
    wide_layers: int = 0


_SILU, _GELU = "silu", "gelu_pytorch_tanh"
_LLAMA = Architecture(
    "llama",
    _SILU,
    ropes=("default", "linear", "llama3"),
    flags=frozenset({"attention_bias", "mlp_bias"}),
    interleaved=True,
)

#: By family. Granite is missing: llama.cpp has it, but transformers cannot load it back, so it could not be proven.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(
        "qwen2", _SILU, ("default", "linear"), required_flags=frozenset({"qkv_bias"}), fills_hidden=True
    ),
    "qwen3": Architecture("qwen3", _SILU, ("default", "linear")),
    "gemma2": Architecture("gemma2", _GELU, gemma=True, period=2, wide_layers=46),
    "gemma3_text": Architecture("gemma3", _GELU, gemma=True, period=6, wide_layers=62),
    "phi3": Architecture("phi3", _SILU, fills_hidden=True),
    "starcoder2": Architecture(
        "starcoder2", _GELU, ("default", "linear"), required_flags=frozenset({"use_bias"}), fills_hidden=True
    ),
}


@dataclass(frozen=True)
class Placed:
    """A tensor of the file: its name, where it comes from, its shape as torch has it, its type in gguf."""

    name: str
    slot: TensorSlot
    layer: int | None
    shape: tuple[int, ...]
    stored: Any


def check_layers(spec: ModelSpec) -> None:
    """Refuse a model of a family, or with layers, that cannot be written.

    Raises:
        ModelError: naming the reason.
    """
    if not spec.is_uniform:
        raise ModelError(
            "The layers of this model differ in shape, or lack a sub-block; llama.cpp's architectures have one shape.",
            expected="equal and whole layers",
            fix="Prune with a uniform allocation and whole layers, or export with --target onnx.",
        )
    if spec.family not in ARCHITECTURES:
        raise ModelError(
            f"flabc cannot write {spec.family} models as GGUF.", expected=f"one of {', '.join(ARCHITECTURES)}"
        )


def check(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Refuse a model that llama.cpp would not load, or would compute differently.

    Args:
        spec: its shapes; ``check_layers`` has let them pass.
        config: its config as transformers completes it.

    Raises:
        ModelError: naming the first reason.
    """
    for subject, expected, found in _wishes(ARCHITECTURES[spec.family], spec, config):
        if found != expected and not (isinstance(expected, tuple) and found in expected):
            raise ModelError(
                f"llama.cpp cannot compute this {spec.family} model: {subject}.",
                expected=str(expected),
                found=str(found),
                fix="Export with --target onnx, or serve the checkpoint with transformers.",
            )


def _wishes(arch: Architecture, spec: ModelSpec, config: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What llama.cpp's code takes for granted: what about, what it wants (one of several if a tuple), what is there."""
    layer = spec.layers[0]
    on = {flag for flag, value in spec.flags.items() if value and flag != "untied"}
    yield "the FFN's activation", arch.activation, config.get("hidden_activation") or config.get("hidden_act")
    yield "how rotary positions are scaled", arch.ropes, spec.rope_type
    yield "the share of a head that is rotated", 1.0, _rope(config).get("partial_rotary_factor") or 1.0
    yield "biases that its loader has no place for", "none", _listed(on - arch.flags - arch.required_flags)
    yield "biases that are missing though its loader wants them", "none", _listed(arch.required_flags - on)
    if arch.fills_hidden:
        yield (
            "the width of all query heads together, which its loader takes from hidden_size",
            spec.hidden_size,
            layer.num_attention_heads * spec.head_dim,
        )
    if arch.gemma:
        wide = len(spec.layers) == arch.wide_layers
        scale = spec.hidden_size // layer.num_attention_heads if wide else spec.head_dim
        yield "the output matrix, which is the embedding", True, spec.tie_word_embeddings
        yield "what attention scores are scaled by", scale, config["query_pre_attn_scalar"]
        yield "which layers attend through a window", _pattern(arch, spec), list(config["layer_types"])
        capped = [config.get(key) is not None for key in ("attn_logit_softcapping", "final_logit_softcapping")]
        yield "which scores are bounded (attention, logits)", [arch.name == "gemma2"] * 2, capped


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _pattern(arch: Architecture, spec: ModelSpec) -> list[str]:
    return [
        "full_attention" if (index + 1) % arch.period == 0 else "sliding_attention" for index in range(len(spec.layers))
    ]


def context_length(spec: ModelSpec, config: Mapping[str, Any]) -> int:
    """Tokens that llama.cpp may be given.

    Of the families written here it has windows for Gemma only; elsewhere every token attends to all before it, which
    is the same up to the length of the window.
    """
    window = config.get("sliding_window")
    if window is None or ARCHITECTURES[spec.family].gemma or not config.get("use_sliding_window", True):
        return spec.max_position_embeddings
    return min(spec.max_position_embeddings, int(window))


def write(
    checkpoint: Path, spec: ModelSpec, config: Mapping[str, Any], out: Path, *, precision: str, name: str
) -> dict[str, int]:
    """Write a checkpoint as GGUF. Tensors are read, converted and written one after another.

    Args:
        checkpoint: a Hugging Face folder with safetensors and a ``tokenizer.json``.
        spec: its shapes; ``check`` has let them pass.
        config: its config as transformers completes it.
        out: the file to write.
        precision: a key of ``PRECISIONS``. Rows that do not divide into blocks of 32 are stored as fp16 at int8.
        name: what llama.cpp shows.

    Returns:
        how many tensors are stored in which type.

    Raises:
        ModelError: if the tokenizer cannot be written, a tensor is missing, or a number is too large for the type.
    """
    gguf = require("gguf", "compress")
    vocabulary = Vocabulary.of(checkpoint, spec.vocab_size)
    placed = list(_placed(spec, precision))
    with closing(gguf.GGUFWriter(out, ARCHITECTURES[spec.family].name)) as writer:
        writer.add_name(name)
        writer.add_file_type(
            gguf.LlamaFileType[f"{'ALL' if precision == 'fp32' else 'MOSTLY'}_{PRECISIONS[precision]}"]
        )
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, spec, config)
        vocabulary.add_to(writer)
        _write_tensors(writer, CheckpointWeights(checkpoint, spec), placed, spec, config)
    return _counts(placed)


def _write_tensors(
    writer: Any, weights: CheckpointWeights, placed: Sequence[Placed], spec: ModelSpec, config: Mapping[str, Any]
) -> None:
    """Announce every tensor, then write one after another: the file begins with where each of them lies."""
    factors = _frequency_factors(spec, config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in placed:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor), tensor.stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    with progress("writing weights", len(placed)) as advance:
        for tensor in placed:
            writer.write_tensor_data(_encoded(_laid_out(weights, tensor, spec), tensor.stored, tensor.slot.name))
            advance(1)


def rounded(matrix: Array, precision: str) -> Array:
    """A matrix, float32, as it comes back from a file of that precision."""
    gguf = require("gguf", "compress")
    stored = _stored(matrix.shape, precision)
    return np.asarray(gguf.dequantize(_encoded(matrix, stored, "matrix"), stored), np.float32).reshape(matrix.shape)


def _placed(spec: ModelSpec, precision: str) -> Iterator[Placed]:
    gguf = require("gguf", "compress")
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[spec.family].name]
    names = gguf.get_tensor_name_map(arch, len(spec.layers))
    for slot, layer, shape in spec.tensors():
        name = names.get_name(slot.name.format(layer=layer), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"llama.cpp has no name for {slot.name} in {ARCHITECTURES[spec.family].name}.")
        yield Placed(name, slot, layer, shape, _stored(shape, precision))


def _stored(shape: tuple[int, ...], precision: str) -> Any:
    """The type of a tensor in the file."""
    types = require("gguf", "compress").GGMLQuantizationType
    if len(shape) == 1:
        return types.F32  # llama.cpp adds and scales in float32
    wanted = types[PRECISIONS[precision]]
    block = require("gguf", "compress").GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else types.F16


def _bytes(tensor: Placed) -> int:
    block, size = require("gguf", "compress").GGML_QUANT_SIZES[tensor.stored]
    return math.prod(tensor.shape) // int(block) * int(size)


def _encoded(tensor: Array, stored: Any, name: str) -> Array:
    """The tensor in the file's type.

    Raises:
        ModelError: if a number is too large for float16.
    """
    with np.errstate(over="ignore"):
        data: Array = require("gguf", "compress").quantize(np.ascontiguousarray(tensor), stored)
    if data.dtype == np.float16 and not np.isfinite(data).all():
        raise ModelError(
            f"{name} has numbers that float16 cannot hold.",
            expected="at most 65504 in size",
            found=f"{np.abs(tensor).max():.4g}",
            fix="Give --precision bf16 or fp32.",
        )
    return data


def _laid_out(weights: CheckpointWeights, tensor: Placed, spec: ModelSpec) -> Array:
    """The tensor in float32, with rows and offsets as llama.cpp's converter leaves them."""
    arch, slot = ARCHITECTURES[spec.family], tensor.slot
    data = weights.get(slot.role, tensor.layer)
    if tensor.layer is not None and arch.interleaved and slot.role.removesuffix("_bias") in ("q", "k"):
        layer = spec.layers[tensor.layer]
        return _interleaved(data, layer.num_attention_heads if slot.role[0] == "q" else layer.num_key_value_heads)
    if arch.gemma and len(tensor.shape) == 1 and "norm" in slot.role:
        return data + np.float32(1)  # Gemma multiplies by one plus the weight, llama.cpp by the weight
    return data


def _interleaved(rows: Array, heads: int) -> Array:
    """(heads * head_dim, ...) with the two halves of every head's rows taken in turn."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _add_shape(writer: Any, spec: ModelSpec, config: Mapping[str, Any]) -> None:
    arch, layer = ARCHITECTURES[spec.family], spec.layers[0]
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(context_length(spec, config))
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(layer.intermediate_size)
    writer.add_head_count(layer.num_attention_heads)
    writer.add_head_count_kv(layer.num_key_value_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    (writer.add_layer_norm_eps if arch.name == "starcoder2" else writer.add_layer_norm_rms_eps)(spec.rms_norm_eps)
    if spec.rope_type == "linear":
        writer.add_rope_scaling_type(require("gguf", "compress").RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(_rope(config)["factor"])
    if arch.gemma:
        _add_gemma(writer, config)


def _add_gemma(writer: Any, config: Mapping[str, Any]) -> None:
    writer.add_sliding_window(config["sliding_window"])
    if config.get("attn_logit_softcapping") is not None:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if "sliding_attention" in config["rope_parameters"]:
        writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope: Mapping[str, Any] = config.get("rope_parameters") or {}
    inner: Mapping[str, Any] = rope.get("full_attention", rope)
    return inner


def _frequency_factors(spec: ModelSpec, config: Mapping[str, Any]) -> Array | None:
    """What each rotary frequency is divided by, (head_dim / 2,), if positions are scaled as in Llama 3.1; else None.

    Wavelengths beyond ``original / low_freq_factor`` are stretched by ``factor``, those below
    ``original / high_freq_factor`` stay, and what lies between is blended (Llama 3.1's ``apply_scaling``).
    """
    if spec.rope_type != "llama3":
        return None
    rope = _rope(config)
    wavelengths = 2 * np.pi * spec.rope_theta ** (np.arange(0, spec.head_dim, 2) / spec.head_dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((rope["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / rope["factor"] + kept), np.float32)


def _counts(placed: Sequence[Placed]) -> dict[str, int]:
    names = [tensor.stored.name for tensor in placed]
    return {name: names.count(name) for name in dict.fromkeys(names)}
