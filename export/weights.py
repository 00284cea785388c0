"""A checkpoint's tensors, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flabc.errors import ModelError, require
from flabc.families import Axis, family_named
from flabc.spec import ModelSpec

Array = npt.NDArray[Any]


class CheckpointWeights:
    """The safetensors files of a Hugging Face folder, by the roles that the family gives its tensors.

    Nothing is kept: each call reads the file, so that exporting a large model needs memory for one tensor.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._folder = folder
        self._slots = {slot.role: slot for slot in family_named(spec.family).layer_tensors}
        self._slots |= {slot.role: slot for slot in family_named(spec.family).tensors}
        self._safetensors = require("safetensors", "export")
        require("ml_dtypes", "export")  # teaches numpy bfloat16
        index = folder / "model.safetensors.index.json"
        self._files: dict[str, str] | None = None
        if index.is_file():
            self._files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]

    def get(self, role: str, layer: int | None = None) -> Array:
        """The tensor that plays a role, in float32, in the shape torch stores it: linear weights are (out, in).

        Raises:
            ModelError: if the checkpoint lacks it.
        """
        name = self._slots[role].name.format(layer=layer)
        file = self._folder / (self._files.get(name, "") if self._files is not None else "model.safetensors")
        try:
            with self._safetensors.safe_open(file, framework="numpy") as opened:
                tensor: Array = opened.get_tensor(name)
        except (OSError, self._safetensors.SafetensorError) as error:
            raise ModelError(f"{self._folder} has no readable tensor {name!r}: {error}") from error
        return tensor.astype(np.float32)

    def axes(self, role: str) -> tuple[Axis, Axis]:
        """The spaces of a linear weight's rows and columns; its projections are not fused."""
        (rows,), (columns,) = (self._slots[role].segments(axis) for axis in range(2))
        return rows, columns

    def has(self, role: str, spec: ModelSpec) -> bool:
        """Whether the family's flags give the model tensors of that role."""
        slot = self._slots.get(role)
        return slot is not None and (slot.when is None or spec.flags.get(slot.when, False))
