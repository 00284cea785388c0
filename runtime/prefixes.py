"""Keys and values of prompts that were computed, for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

#: Shorter beginnings are computed anew: that costs less than a row of its own in a step.
SHORTEST = 16

Saved = Mapping[str, Any]


class PrefixCache:
    """Sequences with their keys and values, those used least recently forgotten first.

    Args:
        max_bytes: how much they may take together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._entries: OrderedDict[tuple[int, ...], Saved] = OrderedDict()

    def find(self, prompt_ids: Sequence[int]) -> tuple[Saved, int] | None:
        """What begins as a prompt does, and for how many tokens: never the last two, which are computed together."""
        best = max(self._entries, key=lambda ids: common(ids, prompt_ids[:-2]), default=())
        length = common(best, prompt_ids[:-2])
        if not length:
            return None
        self._entries.move_to_end(best)
        return self._entries[best], length

    def put(self, ids: Sequence[int], save: Callable[[int], Saved]) -> None:
        """Keep a sequence, unless one that begins with all of it is there; ``save`` is given its length.

        Args:
            ids: its tokens.
            save: a function that copies the keys and values of so many of them.
        """
        key = tuple(ids)
        longer = next((other for other in self._entries if other[: len(key)] == key), None)
        if longer is not None:
            self._entries.move_to_end(longer)
        elif len(key) >= SHORTEST:
            self._add(key, save(len(key)))

    def _add(self, key: tuple[int, ...], saved: Saved) -> None:
        for shorter in [other for other in self._entries if key[: len(other)] == other]:
            self._drop(shorter)
        self._entries[key] = saved
        self.bytes += _bytes(saved)
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[int, ...]) -> None:
        self.bytes -= _bytes(self._entries.pop(key))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; 0 if they are too few to be worth it."""
    shortest = min(len(a), len(b))
    if shortest < SHORTEST or tuple(a[:SHORTEST]) != tuple(b[:SHORTEST]):
        return 0
    differ = np.flatnonzero(np.array(a[:shortest]) != np.array(b[:shortest]))
    return int(differ[0]) if len(differ) else shortest


def _bytes(saved: Saved) -> int:
    return sum(int(part.nbytes) for part in saved.values())
