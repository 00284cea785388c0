"""The weights of a static decoder: from a checkpoint's files, or random ones of given shapes. Imports torch.

What is multiplied by the same input lies in one matrix (query, key and value; gate and up), so that a layer starts four
products instead of seven.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flabc.errors import EngineError, UnknownNameError
from flabc.spec import LayerSpec, ModelSpec

#: The families whose layer the decoder computes: RMSNorm, a gated FFN, rotary positions, attention without a window.
FAMILIES = ("llama", "qwen2", "qwen3")

#: Numbers that random weights repeat: drawing billions would take longer than measuring.
BLOCK = 2**22

#: Gives a tensor by its name in the checkpoint and its shape.
Source = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer; what a shape or family lacks is None.

    Letters: D hidden_size, H heads, K key-value heads, d head_dim, F intermediate_size.
    """

    shape: LayerSpec
    attention_norm: Tensor | None = None  # (D,)
    qkv: Tensor | None = None  # ((H + 2K) d, D)
    qkv_bias: Tensor | None = None
    q_norm: Tensor | None = None  # (d,)
    k_norm: Tensor | None = None
    o: Tensor | None = None  # (D, H d)
    o_bias: Tensor | None = None
    ffn_norm: Tensor | None = None  # (D,)
    gate_up: Tensor | None = None  # (2F, D)
    gate_up_bias: Tensor | None = None
    down: Tensor | None = None  # (D, F)
    down_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class DecoderWeights:
    """A whole model; ``head`` is the embedding itself where they are tied."""

    embedding: Tensor  # (V, D)
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # (D,)
    head: Tensor  # (V, D)


def gathered(spec: ModelSpec, source: Source) -> DecoderWeights:
    """All weights of a model.

    Args:
        spec: its shapes, layer by layer.
        source: where each tensor comes from.

    Raises:
        UnknownNameError: if the family's layer is none that the decoder computes.
    """
    if spec.family not in FAMILIES:
        raise UnknownNameError("family of the static decoder", spec.family, FAMILIES)
    found: dict[int | None, dict[str, Tensor]] = {layer: {} for layer in (None, *range(len(spec.layers)))}
    for slot, layer, shape in spec.tensors():
        found[layer][slot.role] = source(slot.name.format(layer=layer), shape)
        _fuse(found[layer])
    outer = found[None]
    layers = tuple(LayerWeights(shape, **found[index]) for index, shape in enumerate(spec.layers))
    return DecoderWeights(outer["embedding"], layers, outer["final_norm"], outer.get("head", outer["embedding"]))


def _fuse(roles: dict[str, Tensor]) -> None:
    """Put what is complete of a fused matrix into one."""
    for name, parts in {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.items():
        for end in ("", "_bias"):
            keys = [f"{part}{end}" for part in parts]
            if all(key in roles for key in keys):
                roles[f"{name}{end}"] = torch.cat([roles.pop(key) for key in keys])


def random_source(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Source:
    """Weights of any shape for measuring speed: normal numbers, the same ones again and again."""
    draw = torch.Generator(device).manual_seed(seed)
    block = torch.randn(BLOCK, generator=draw, device=device, dtype=torch.float32).mul_(0.02).to(dtype)

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1 and "bias" not in name:  # of a norm
            return torch.ones(shape, dtype=dtype, device=device)
        tensor = torch.empty(shape, dtype=dtype, device=device)
        flat = tensor.view(-1)
        for begin in range(0, len(flat), BLOCK):
            piece = flat[begin : begin + BLOCK]
            piece.copy_(block[: len(piece)])
        return tensor

    return source


def stored_source(folder: Path, dtype: torch.dtype, device: torch.device) -> Source:
    """Weights from the safetensors files of a Hugging Face folder, read one by one.

    Raises:
        EngineError: if a file or a tensor is missing, or has another shape than the config says.
    """
    from safetensors import SafetensorError, safe_open

    files = _files(folder)

    def source(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in files:
            raise EngineError(f"{folder} lacks the tensor {name}.")
        try:
            with safe_open(files[name], framework="pt", device=str(device)) as opened:
                tensor: Tensor = opened.get_tensor(name).to(dtype)
        except (SafetensorError, OSError) as error:
            raise EngineError(f"{files[name]} cannot be read: {error}") from error
        if tuple(tensor.shape) != shape:
            raise EngineError(f"{name} does not fit its config.", expected=str(shape), found=str(tuple(tensor.shape)))
        return tensor.clone() if device.type == "cpu" else tensor  # not a view of the file, which is closed

    return source


def _files(folder: Path) -> dict[str, Path]:
    """Which file each tensor lies in."""
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items()}
    single = folder / "model.safetensors"
    try:
        with safe_open(single, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), single)
    except (SafetensorError, OSError) as error:
        raise EngineError(f"{single} cannot be read: {error}") from error


def tensors_of(weights: DecoderWeights) -> Iterator[Tensor]:
    """Every tensor that a step reads whole: all but the embedding, unless it is the output matrix too."""
    for layer in weights.layers:
        yield from (value for value in vars(layer).values() if isinstance(value, Tensor))
    yield from (weights.final_norm, weights.head)


def bytes_read(weights: DecoderWeights) -> int:
    """Bytes of weights that one decoding step reads, however many sequences are in it."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(weights))
