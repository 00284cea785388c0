"""Keys and values of prompts that were computed, for prompts that begin alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .backend import Ids

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
        # By their first tokens: of thousands of sequences only those that may matter are looked at.
        self._alike: dict[tuple[int, ...], dict[tuple[int, ...], Ids]] = {}

    def find(self, prompt_ids: Sequence[int]) -> tuple[Saved, int] | None:
        """What begins as a prompt does, and for how many tokens: never the last two, which are computed together."""
        alike = self._alike.get(tuple(prompt_ids[:SHORTEST]))
        if not alike or len(prompt_ids) < SHORTEST + 2:
            return None
        wanted = np.array(prompt_ids[:-2])
        lengths = {key: _common(ids, wanted) for key, ids in alike.items()}
        best = max(lengths, key=lengths.__getitem__)
        self._entries.move_to_end(best)
        return self._entries[best], lengths[best]

    def put(self, ids: Sequence[int], save: Callable[[int], Saved]) -> None:
        """Keep a sequence, unless one that begins with all of it is there; ``save`` is given its length.

        Args:
            ids: its tokens.
            save: a function that copies the keys and values of so many of them.
        """
        key = tuple(ids)
        alike = self._alike.get(key[:SHORTEST], {})
        longer = next((other for other in alike if other[: len(key)] == key), None)
        if longer is not None:
            self._entries.move_to_end(longer)
        elif len(key) >= SHORTEST:
            self._add(key, save(len(key)))

    def _add(self, key: tuple[int, ...], saved: Saved) -> None:
        if _bytes(saved) > self.max_bytes:  # it would push all others out, and then itself
            return
        for shorter in [other for other in self._alike.get(key[:SHORTEST], ()) if key[: len(other)] == other]:
            self._drop(shorter)
        self._entries[key] = saved
        self._alike.setdefault(key[:SHORTEST], {})[key] = np.array(key)
        self.bytes += _bytes(saved)
        while self.bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: tuple[int, ...]) -> None:
        self.bytes -= _bytes(self._entries.pop(key))
        alike = self._alike[key[:SHORTEST]]
        del alike[key]
        if not alike:
            del self._alike[key[:SHORTEST]]


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; 0 if they are too few to be worth it."""
    if min(len(a), len(b)) < SHORTEST or tuple(a[:SHORTEST]) != tuple(b[:SHORTEST]):
        return 0
    return _common(np.array(a), np.array(b))


def _common(a: Ids, b: Ids) -> int:
    shortest = min(len(a), len(b))
    differ = np.flatnonzero(a[:shortest] != b[:shortest])
    return int(differ[0]) if len(differ) else shortest


def _bytes(saved: Saved) -> int:
    return sum(int(part.nbytes) for part in saved.values())
