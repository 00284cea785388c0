"""Engines of the ONNX standard's operators alone: a KV cache of fixed length, written where each row stands.

Run by ONNX Runtime, as the proof of what TensorRT is given. The cache is bound as input and as output: TensorScatter
then writes in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from flabc.artifact import GRAPH, SCORING_GRAPH
from flabc.errors import require
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.spec import ModelSpec

from .ort import check_dtype, new_cache, open_graph, restore_row, save_row


def open_backend(folder: Path, spec: ModelSpec, limits: Limits) -> StaticCacheBackend:
    """Open an engine folder.

    Raises:
        MissingExtraError: if onnxruntime is not installed.
        EngineError: if ONNX Runtime refuses the graph or does not have the provider asked for.
    """
    return StaticCacheBackend(folder, spec, limits)


class StaticCacheBackend:
    """An engine with a static cache in ONNX Runtime. See ``Backend`` for the contract."""

    name = "onnxruntime-static"

    def __init__(self, folder: Path, spec: ModelSpec, limits: Limits) -> None:
        check_dtype(limits)
        self.spec, self.limits, self._folder = spec, limits, folder
        self._runtime = require("onnxruntime", "cpu")
        self._session = open_graph(folder / GRAPH, limits)
        self._cache = new_cache(spec, limits.max_batch, limits.max_length)
        self._lengths = np.zeros(0, np.int64)

    @cached_property
    def _scorer(self) -> Any:
        return open_graph(self._folder / SCORING_GRAPH, self.limits)

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._lengths = np.zeros(batch, np.int64)

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to the sequences from ``first`` on; (B, S) and (B,) in, (B, V) out."""
        rows = slice(first, first + len(ids))
        logits = self._run(first, ids, counts, self._lengths[rows])
        self._lengths[rows] += counts
        return logits

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        running = len(self._lengths)
        self.limits.check_batch(running + len(ids))
        logits = self._run(running, ids, counts, np.zeros(len(ids), np.int64))
        self._lengths = np.concatenate([self._lengths, counts])
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order."""
        chosen = list(rows)
        self._lengths = self._lengths[chosen]
        used = int(self._lengths.max(initial=0))
        for buffer in self._cache.values():
            buffer[: len(chosen), :, :used] = buffer[chosen, :, :used]

    def save(self, row: int, length: int) -> dict[str, Logits]:
        """A copy of the keys and values of a sequence's first tokens, (KV heads, length, head_dim) each."""
        return save_row(self._cache, row, length)

    def restore(self, saved: Mapping[str, Logits], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(len(self._lengths) + 1)
        restore_row(self._cache, len(self._lengths), saved, length)
        self._lengths = np.append(self._lengths, length)

    def score(self, ids: Ids) -> Logits:
        """Logits at every position of fresh sequences, (B, S, V)."""
        rows, length = ids.shape
        empty = new_cache(self.spec, rows, length)
        feeds = {f"past_key_values.{name}": buffer for name, buffer in empty.items()}
        counts = {"write_indices": np.zeros(rows, np.int64), "token_counts": np.full(rows, length)}
        wanted = {given.name for given in self._scorer.get_inputs()}  # the last token is not picked, nor is it counted
        feeds |= {name: array for name, array in {"input_ids": ids, **counts}.items() if name in wanted}
        (logits,) = self._scorer.run(["logits"], feeds)
        scores: Logits = logits
        return scores

    def _run(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        """Write tokens of the rows from ``first`` on behind what each has; logits after each row's last."""
        self.limits.check_length(int((begin + counts).max()))
        if int(begin.max()) + ids.shape[1] > self.limits.max_length:  # padding would be written behind the cache
            alone = (np.arange(len(ids))[:, None], ids[:, None], counts[:, None], begin[:, None])
            parts = zip(*alone, strict=True)
            return np.concatenate([self._run(first + int(r[0]), i[:, : int(c[0])], c, b) for r, i, c, b in parts])
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
