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

#: Projections that some families keep in one tensor, one after another.
FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}

#: The place of each in its tensor.
_SEGMENT = {"q": 0, "k": 1, "v": 2, "gate": 0, "up": 1}


class CheckpointWeights:
    """The safetensors files of a Hugging Face folder, by the roles that the family gives its tensors.

    Nothing is kept: each call reads the file, so that exporting a large model needs memory for one tensor.
    """

    def __init__(self, folder: Path, spec: ModelSpec) -> None:
        self._folder, self._spec = folder, spec
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
        if role in self._slots:
            return self._read(self._slots[role].name.format(layer=layer)).astype(np.float32)
        slot = self._slots[FUSED[role]]
        shape = None if layer is None else self._spec.layers[layer]
        sizes = [self._spec.axis_size(space, shape) for space in slot.segments(0)]
        begin, size = sum(sizes[: _SEGMENT[role]]), sizes[_SEGMENT[role]]
        return self._read(slot.name.format(layer=layer))[begin : begin + size].astype(np.float32)

    def _read(self, name: str) -> Array:
        file = self._folder / (self._files.get(name, "") if self._files is not None else "model.safetensors")
        try:
            with self._safetensors.safe_open(file, framework="numpy") as opened:
                tensor: Array = opened.get_tensor(name)
        except (OSError, self._safetensors.SafetensorError) as error:
            raise ModelError(f"{self._folder} has no readable tensor {name!r}: {error}") from error
        return tensor

    def spaces(self, role: str) -> tuple[Axis, ...]:
        """The space of each axis of the tensor that plays a role."""
        if role in self._slots:
            slot = self._slots[role]
            return tuple(slot.segments(axis)[0] for axis in range(len(slot.axes)))
        slot = self._slots[FUSED[role]]
        return slot.segments(0)[_SEGMENT[role]], slot.segments(1)[0]

    def has(self, role: str, spec: ModelSpec) -> bool:
        """Whether the family's flags give the model tensors of that role."""
        slot = self._slots.get(role)
        return slot is not None and (slot.when is None or spec.flags.get(slot.when, False))
