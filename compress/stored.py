"""Tensors that stay on disk until they are used: a model larger than memory is cut without ever being whole in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flabc.errors import ModelError


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a safetensors file, and what was selected of it since.

    Args:
        file: the file.
        name: the tensor's name there.
        shape: after all selections.
        dtype: as it is stored.
        picks: axis and indices of each selection, in order.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    picks: tuple[tuple[int, Tensor], ...] = ()

    def index_select(self, axis: int, index: Tensor) -> Stored:
        """As torch's: the selection is made when the tensor is loaded."""
        shape = (*self.shape[:axis], len(index), *self.shape[axis + 1 :])
        return replace(self, shape=shape, picks=(*self.picks, (axis, index)))

    def numel(self) -> int:
        """How many numbers it holds."""
        return torch.Size(self.shape).numel()

    def load(self) -> Tensor:
        """The tensor, in memory of its own.

        Raises:
            ModelError: if the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as opened:
                tensor: Tensor = opened.get_tensor(self.name)
                for axis, index in self.picks:
                    tensor = tensor.index_select(axis, index)
                return tensor if self.picks else tensor.clone()  # not a view of the file, which is closed
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.file} cannot be read: {error}") from error


#: What a model's weights are: in memory, or on disk.
Weight = Tensor | Stored


def loaded(weight: Weight) -> Tensor:
    """The tensor itself."""
    return weight.load() if isinstance(weight, Stored) else weight


def stored_in(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file, unread.

    Raises:
        SafetensorError: if the file is damaged.
        OSError: if it cannot be read.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        return {
            name: Stored(file, name, tuple(found.get_shape()), _DTYPES[found.get_dtype()])
            for name, found in slices.items()
        }


def spill(tensor: Tensor, folder: Path) -> Stored:
    """Write a tensor to a file of its own in a folder, and let go of it."""
    from safetensors.torch import save_file

    file = folder / f"{len(list(folder.iterdir()))}.safetensors"
    save_file({"tensor": tensor.contiguous()}, file)
    return Stored(file, "tensor", tuple(tensor.shape), tensor.dtype)


#: What safetensors calls the dtypes of weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
