"""Torch with a KV cache of fixed length and, on a GPU, CUDA graphs: checkpoints of Llama and Qwen, at full speed.

``reference.py`` is the other one of torch: transformers' own code, for every family, slower.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flabc.errors import EngineError, UnknownNameError, require
from flabc.families.per_layer import plain_view
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .fixed_cache import FixedCache
from .reference import device_of

#: What it can compute in, as torch calls it.
DTYPES = ("float32", "bfloat16", "float16")

#: Positions that do not depend on the length of the text, which a table can hold.
SCALED = ("linear", "llama3", "yarn")


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> StaticTorch:
    """Open a Hugging Face folder.

    Raises:
        MissingExtraError: if torch is not installed, or transformers where positions are scaled.
        EngineError: if CUDA is asked for and not there, or the positions are of a type that no table can hold.
        UnknownNameError: if the dtype, the provider or the family is none of those that there are.
    """
    return StaticTorch(folder, spec, limits)


class StaticTorch(FixedCache):
    """A checkpoint in the static decoder. See ``Backend`` for the contract."""

    name = "torch-static"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        super().__init__(limits, limits.max_length)
        self.spec = spec
        self._torch: Any = require("torch", "compress")
        from .decoder_weights import gathered, stored_source
        from .static_decoder import StaticDecoder

        if limits.threads is not None:
            self._torch.set_num_threads(limits.threads)
        self._device = device_of(self._torch, limits.provider)
        if limits.dtype not in DTYPES:
            raise UnknownNameError("dtype", limits.dtype, DTYPES)
        source = stored_source(folder, getattr(self._torch, limits.dtype), self._device)
        self._decoder = StaticDecoder(
            spec,
            gathered(spec, source),
            limits.max_batch,
            limits.max_length,
            graphs=self._device.type == "cuda",
            rotary=rotary_of(folder, spec),
        )

    def save(self, row: int, length: int) -> dict[str, Any]:
        """A copy of the keys and values of a sequence's first tokens, (K, length, d) each."""
        pairs = {"key": self._decoder.keys, "value": self._decoder.values}
        return {
            f"{index}.{kind}": part[row, :, :length].clone()
            for kind, parts in pairs.items()
            for index, part in enumerate(parts)
        }

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        self.limits.check_length(ids.shape[1])
        return self._numpy(self._decoder.score(self._tensor(ids)))

    def _put(self, row: int, saved: Mapping[str, Any], length: int) -> None:
        for kind, parts in {"key": self._decoder.keys, "value": self._decoder.values}.items():
            for index, part in enumerate(parts):
                part[row, :, :length] = saved[f"{index}.{kind}"][:, :length]

    def _step(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        new, last = self._tensor(ids), self._tensor(counts - 1)
        if not begin.any():
            return self._numpy(self._decoder.prompt(new, last, first))
        positions = begin[:, None] + np.arange(ids.shape[1])
        longest = int(begin.max()) + ids.shape[1]
        return self._numpy(self._decoder.extend(new, self._tensor(positions), last, longest, first))

    def _move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        to, rows = (self._tensor(np.array(each, np.int64)) for each in zip(*moves, strict=True))
        for part in (*self._decoder.keys, *self._decoder.values):
            part[to, :, :used] = part[rows, :, :used]

    def _tensor(self, array: Ids) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    def _numpy(self, logits: Any) -> Logits:
        array: Logits = logits.float().cpu().numpy()
        return array.copy()  # what is on the processor would be a view


def rotary_of(folder: Path, spec: ModelSpec) -> Any:
    """The rotary positions of a checkpoint; None if they are plain.

    Raises:
        EngineError: if they depend on the length of the text.
    """
    if spec.rope_type == "default":
        return None
    if spec.rope_type not in SCALED:
        raise EngineError(
            "These positions depend on the length of the text.", expected=" or ".join(SCALED), found=spec.rope_type
        )
    from .decoder_parts import Rotary

    transformers: Any = require("transformers", "compress")
    rope: Any = require("transformers.modeling_rope_utils", "compress")
    plain = plain_view(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config = transformers.AutoConfig.for_model(**plain)
    return Rotary(*rope.ROPE_INIT_FUNCTIONS[spec.rope_type](config, "cpu"))
