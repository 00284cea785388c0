"""The weight files of a model: which they are, how large, and whether their tensors can be read one by one."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from flabc.errors import ModelError
from flabc.spec import ModelSpec

from .location import Location
from .stored import Weight, stored_in


def folder_weights(folder: Path, *, stream: bool, pickled: bool) -> dict[str, Weight]:
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
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [name]
    return [folder / shard for shard in names]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: if it is damaged.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}", fix="Get an undamaged copy of the file.") from error
