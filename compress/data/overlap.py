"""Overlap: tasks that are nearly the same, and tasks that a benchmark knows.

Near-duplicates are found by MinHash and locality-sensitive hashing (Broder, 1997; the package datasketch), what a
benchmark knows by 13-grams of words, as for GPT-3 (Brown et al., 2020, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from flabc.errors import require

#: The estimated Jaccard similarity of shingles from which two tasks count as one.
SIMILAR = 0.7

#: Tokens of a shingle, and hash functions of a MinHash.
SHINGLE, PERMUTATIONS = 5, 128

#: Words in a row that nobody writes twice by chance.
GRAM = 13

_TOKEN, _WORD = re.compile(r"\w+|[^\w\s]"), re.compile(r"\w+")

T = TypeVar("T")


def distinct(items: Sequence[T], texts: Sequence[str]) -> list[T]:
    """The items whose text is like that of none before them.

    Args:
        items: whatever they are, the preferred first.
        texts: the text of each.

    Raises:
        MissingExtraError: if datasketch is not installed.
    """
    sketch: Any = require("datasketch", "data")
    index, hashes, kept = sketch.MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS), dict[int, Any](), list[T]()
    for place, (item, text) in enumerate(zip(items, texts, strict=True)):
        minhash = sketch.MinHash(num_perm=PERMUTATIONS)
        minhash.update_batch(sorted(_shingles(text)))
        if any(hashes[near].jaccard(minhash) >= SIMILAR for near in index.query(minhash)):
            continue
        index.insert(place, minhash)
        hashes[place] = minhash
        kept.append(item)
    return kept


def _shingles(text: str) -> set[bytes]:
    tokens = _TOKEN.findall(text)
    return {" ".join(tokens[at : at + SHINGLE]).encode() for at in range(max(1, len(tokens) - SHINGLE + 1))}


class Benchmark:
    """What a benchmark says, as grams of words.

    Args:
        texts: its problems and solutions.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._grams = {gram for text in texts for gram in _grams(text)}

    def knows(self, text: str) -> bool:
        """Whether a text has a gram of it."""
        return any(gram in self._grams for gram in _grams(text))


def _grams(text: str) -> Iterator[tuple[str, ...]]:
    words = [word.lower() for word in _WORD.findall(text)]
    return (tuple(words[at : at + GRAM]) for at in range(len(words) - GRAM + 1))
