"""What backends over a KV cache of fixed length share: where each row stands, and what is written in one step.

Letters in shape comments: B sequences, S new tokens, M places in the cache, V vocab_size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flabc.runtime.backend import Ids, Limits, Logits


class FixedCache(ABC):
    """Rows of a cache that new tokens are written into behind what each row holds. See ``Backend`` for the contract.

    Args:
        limits: how much may be held.
        places: M, how long the cache is; at least ``limits.max_length``.
        max_input: tokens of one row that can be written in one step; None if only the cache bounds them.
    """

    def __init__(self, limits: Limits, places: int, max_input: int | None = None) -> None:
        self.limits = limits
        self._places, self._max_input = places, max_input or places
        self._lengths = np.zeros(0, np.int64)

    def start(self, batch: int) -> None:
        """Forget all sequences and begin ``batch`` new ones."""
        self.limits.check_batch(batch)
        self._lengths = np.zeros(batch, np.int64)

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        """Append tokens to the sequences from ``first`` on; (B, S) and (B,) in, (B, V) out."""
        rows = slice(first, first + len(ids))
        logits = self._append(first, ids, counts, self._lengths[rows])
        self._lengths[rows] += counts
        return logits

    def join(self, ids: Ids, counts: Ids) -> Logits:
        """Let new sequences join behind those that are running."""
        running = len(self._lengths)
        self.limits.check_batch(running + len(ids))
        logits = self._append(running, ids, counts, np.zeros(len(ids), np.int64))
        self._lengths = np.concatenate([self._lengths, counts])
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only, in this order; only rows that change their place are copied."""
        self._lengths = self._lengths[list(rows)]
        moves = [(to, row) for to, row in enumerate(rows) if to != row]
        if moves:
            self._move(moves, int(self._lengths.max()))

    def restore(self, saved: Mapping[str, Any], length: int) -> None:
        """Let a sequence join that begins with the first tokens of one that was saved."""
        self.limits.check_batch(len(self._lengths) + 1)
        self._put(len(self._lengths), saved, length)
        self._lengths = np.append(self._lengths, length)

    @abstractmethod
    def save(self, row: int, length: int) -> Mapping[str, Any]:
        """A copy of the keys and values of a running sequence's first ``length`` tokens."""

    @abstractmethod
    def _put(self, row: int, saved: Mapping[str, Any], length: int) -> None:
        """Write the first ``length`` places of a copy to a row of the cache."""

    def _append(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        """Write tokens of the rows from ``first`` on behind what each has; logits after each row's last, (B, V)."""
        self.limits.check_length(int((begin + counts).max()))
        new = ids.shape[1]
        # A step writes its padding too, which must fit into the cache.
        if new <= self._max_input and int(begin.max()) + new <= self._places:
            return self._step(first, ids, counts, begin)
        rows = range(len(ids))
        return np.concatenate([self._alone(first + r, ids[r, : counts[r]], int(begin[r])) for r in rows])

    def _alone(self, row: int, ids: Ids, begin: int) -> Logits:
        """Write one row's tokens, (S,), piece by piece; logits after the last, (1, V)."""
        for at in range(0, len(ids), self._max_input):
            piece = ids[None, at : at + self._max_input]
            logits = self._step(row, piece, np.array([piece.shape[1]]), np.array([begin + at]))
        return logits

    @abstractmethod
    def _step(self, first: int, ids: Ids, counts: Ids, begin: Ids) -> Logits:
        """Run the graph once on rows from ``first`` on: (B, S) ids, written from ``begin`` (B,) on; (B, V) out."""

    @abstractmethod
    def _move(self, moves: Sequence[tuple[int, int]], used: int) -> None:
        """Copy rows of the cache, their first ``used`` places at least, all at once; moves are (to, from)."""
