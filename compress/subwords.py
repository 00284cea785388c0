"""Subword vocabularies: which tokens another one needs, and how a set of wanted ones is closed, shrunk and grown.

Each kind of tokenizer says what a token is made of; the rest is common. To add a kind, write a class with what
``Subwords`` leaves open and list it in ``READERS``.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flabc.errors import StageError, UnknownNameError


class Subwords(ABC):
    """The model part of a ``tokenizer.json``."""

    @property
    @abstractmethod
    def symbols(self) -> frozenset[int]:
        """Ids that stay whatever is wanted: what every text can fall back on."""

    @abstractmethod
    def intermediates(self, index: int) -> frozenset[int]:
        """Ids of the tokens that a token is made of on the way; none if it is made in one step or not at all."""

    @abstractmethod
    def by_rank(self) -> Iterable[int]:
        """Ids in the order in which training found them useful."""

    @abstractmethod
    def remapped(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """What changes in the model part of ``tokenizer.json`` when only the ids in ``new_ids`` are kept.

        Args:
            new_ids: old id to new id; keeps the order, closed, with all ``symbols``.
        """

    def closure(self, wanted: Iterable[int]) -> set[int]:
        """The wanted ids and all that they are made of."""
        closed: set[int] = set()
        for index in wanted:
            closed.add(index)
            closed |= self.intermediates(index)
        return closed

    def shrink(self, kept: set[int], fixed: set[int], counts: Mapping[int, int], size: int) -> set[int]:
        """Remove the least frequent leaves until ``size`` ids are left. A leaf is part of no kept derivation.

        Raises:
            StageError: if the tokens that must stay are more than ``size``.
        """
        left = set(kept)
        uses = Counter(part for index in left for part in self.intermediates(index))
        leaves = [(counts.get(index, 0), -index) for index in left - fixed if not uses[index]]
        heapq.heapify(leaves)
        while len(left) > size:
            if not leaves:
                raise StageError(
                    f"The vocabulary cannot be cut to {size} rows.",
                    expected=f"at least {len(left)}: bytes, special tokens and what the chat template emits",
                )
            index = -heapq.heappop(leaves)[1]
            left.discard(index)
            for part in self.intermediates(index):
                uses[part] -= 1
                if not uses[part] and part not in fixed:
                    heapq.heappush(leaves, (counts.get(part, 0), -part))
        return left

    def grow(self, kept: set[int], size: int, first: Iterable[int] = ()) -> set[int]:
        """Add tokens until ``size`` ids are kept or none is left.

        Args:
            kept: closed under derivation; so is the result.
            size: ids to keep.
            first: what to add before all else, where it and what it is made of still fit, in this order; after
                these comes whatever the tokenizer was trained to need first.
        """
        grown = set(kept)
        for index in first:
            made = (self.intermediates(index) | {index}) - grown
            if len(grown) + len(made) <= size:
                grown |= made
            if len(grown) == size:
                break
        for index in self.by_rank():
            if len(grown) >= size:
                break
            if index not in grown and self.intermediates(index) <= grown:
                grown.add(index)
        return grown


def read(tokenizer: Mapping[str, Any]) -> Subwords:
    """The subwords of a ``tokenizer.json``.

    Raises:
        UnknownNameError: if its model is of a kind that is not known.
        StageError: if it is a variant of a known kind that cannot be cut safely.
    """
    kind = tokenizer["model"].get("type")
    if kind not in READERS:
        raise UnknownNameError("kind of tokenizer", str(kind), READERS)
    return READERS[kind](tokenizer)


def _bpe(tokenizer: Mapping[str, Any]) -> Subwords:
    from .bpe import BytePairs

    return BytePairs.of(tokenizer)


def _unigram(tokenizer: Mapping[str, Any]) -> Subwords:
    from .unigram import Pieces

    return Pieces.of(tokenizer)


#: Kinds of tokenizers, by the type of their model in ``tokenizer.json``.
READERS: dict[str, Callable[[Mapping[str, Any]], Subwords]] = {"BPE": _bpe, "Unigram": _unigram}
