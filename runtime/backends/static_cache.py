"""Engines of the ONNX standard's operators alone: a KV cache of fixed length, written where each row stands.

Run by ONNX Runtime, as the proof of what TensorRT is given. The cache is bound as input and as output: TensorScatter
then writes in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flabc.artifact import GRAPH, SCORING_GRAPH
from flabc.errors import require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .fixed_cache import FixedCache
from .ort import check_dtype, open_graph
from .ort_state import Array, cache_dtype, move_rows, new_cache, restore_row, save_row


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> StaticCacheBackend:
    """Open an engine folder.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        EngineError: if ONNX Runtime refuses the graph or does not have the provider asked for.
    """
    return StaticCacheBackend(folder, spec, limits)


class StaticCacheBackend(FixedCache):
    """An engine with a static cache in ONNX Runtime. See ``Backend`` for the contract."""

    name = "onnxruntime-static"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        check_dtype(limits)
        self.spec, self._folder = spec, folder
        self._runtime = require("onnxruntime", "cpu")
        self._session = open_graph(folder / GRAPH, limits)
        places = _places(self._session, limits.max_length)
        super().__init__(replace(limits, max_length=min(limits.max_length, places)), places)
        self._dtype = cache_dtype(self._session)
        self._cache = new_cache(spec, limits.max_batch, places, self._dtype)

    @cached_property
    def _scorer(self) -> Any:
        return open_graph(self._folder / SCORING_GRAPH, self.limits)

    def _move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        move_rows(self._cache, moves, used)

    def save(self, row: int, length: int) -> dict[str, Array]:
        """A copy of the keys and values of a sequence's first tokens, (KV heads, length, head_dim) each."""
        return save_row(self._cache, row, length)

    def _put(self, row: int, saved: Mapping[str, Array], length: int) -> None:
        restore_row(self._cache, row, saved, length)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        rows, length = ids.shape
        empty = new_cache(self.spec, rows, _places(self._scorer, length), self._dtype)
        feeds = {f"past_key_values.{name}": buffer for name, buffer in empty.items()}
        counts = {"write_indices": np.zeros(rows, np.int64), "token_counts": np.full(rows, length)}
        wanted = {given.name for given in self._scorer.get_inputs()}  # the last token is not picked, nor is it counted
        feeds |= {name: array for name, array in {"input_ids": ids, **counts}.items() if name in wanted}
        (logits,) = self._scorer.run(["logits"], feeds)
        scores: Logits = logits
        return scores

    def _step(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        binding = self._session.io_binding()
        for name, buffer in self._cache.items():
            value = self._runtime.OrtValue.ortvalue_from_numpy(buffer[first : first + len(ids)])
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits", "cpu")
        for name, array in (("input_ids", ids), ("write_indices", begin), ("token_counts", counts)):
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        self._session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[len(self._cache)].numpy()
        return logits[:, -1].copy()  # the next run writes to the same memory


def _places(session: Any, wanted: int) -> int:
    """How long the cache is: what the graph fixes, as TensorRT needs it, or else what is wanted."""
    shapes = [given.shape for given in session.get_inputs() if given.name.startswith("past_key_values.")]
    fixed = shapes[0][2] if shapes else None
    return fixed if isinstance(fixed, int) else wanted
