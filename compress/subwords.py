"""What the vocabulary stage asks of a tokenizer's model, whatever its kind: ``bpe`` and ``unigram`` answer.

A token may need others: a BPE token is only made through the intermediate products of its own derivation. A set of
kept tokens is always closed under that need here, so that no kept token becomes unreachable.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from flabc.errors import StageError


class Subwords(ABC):
    """The model part of a ``tokenizer.json``: what its tokens are made of, and what is left of it after a cut."""

    @property
    @abstractmethod
    def symbols(self) -> frozenset[int]:
        """Ids without which some text could no longer be given back; they stay whatever the corpus says."""

    @abstractmethod
    def needs(self, index: int) -> frozenset[int]:
        """Ids of the tokens without which this one cannot be made; those that they need are among them."""

    @abstractmethod
    def natural_order(self) -> Iterator[int]:
        """Every id of the vocabulary, the most useful first as far as the tokenizer itself tells.

        An id may come more than once; its last time is after all that it needs.
        """

    @abstractmethod
    def cut(self, keep: Sequence[int]) -> dict[str, Any]:
        """The fields of the model that change when these old ids, ascending, are numbered anew."""

    def closure(self, wanted: Iterable[int]) -> set[int]:
        """The wanted ids and all that they need."""
        closed: set[int] = set()
        for index in wanted:
            closed.add(index)
            closed |= self.needs(index)
        return closed

    def shrink(self, kept: set[int], fixed: set[int], counts: Mapping[int, int], size: int) -> set[int]:
        """Remove the least frequent leaves until ``size`` ids are left. A leaf is needed by no kept token.

        Raises:
            StageError: if the tokens that must stay are more than ``size``.
        """
        left = set(kept)
        uses = Counter(part for index in left for part in self.needs(index))
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
            for part in self.needs(index):
                uses[part] -= 1
                if not uses[part] and part not in fixed:
                    heapq.heappush(leaves, (counts.get(part, 0), -part))
        return left

    def grow(self, kept: set[int], size: int, first: Iterable[int] = ()) -> set[int]:
        """Add tokens until ``size`` ids are kept or none is left.

        Args:
            kept: closed; so is the result.
            size: ids to keep.
            first: what to add before all else, where it and what it needs still fit, in this order; after these
                come the others in their natural order.
        """
        grown = set(kept)
        for index in chain(first, self.natural_order()):
            if len(grown) >= size:
                break
            missing = (self.needs(index) | {index}) - grown
            if len(grown) + len(missing) <= size:
                grown |= missing
        return grown


def alphabet(vocab: Mapping[str, int], tokenizer: Mapping[str, Any]) -> frozenset[int]:
    """Ids of the byte tokens, and of the characters that could not be spelled in bytes if they were gone.

    Without byte fallback that is every single-character token; with it, those that lack one of their bytes
    (Gemma's tab) and those that the decoder turns into others (the ``▁`` that stands for a space).
    """
    has_bytes = bool(tokenizer["model"].get("byte_fallback"))
    byte_tokens = {_byte_token(byte) for byte in range(256)} & vocab.keys() if has_bytes else set()
    stages = decoder_stages(tokenizer)
    spelling = byte_tokens if any(stage["type"] == "ByteFallback" for stage in stages) else set()
    rewritten = set().union(*(_rewrites(stage) for stage in stages))

    def stays(token: str) -> bool:
        if len(token) != 1:
            return token in byte_tokens
        return token in rewritten or not _spelled(token, spelling)

    return frozenset(index for token, index in vocab.items() if stays(token))


def decoder_stages(tokenizer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of a tokenizer's decoder, those inside a sequence one by one."""
    decoder = tokenizer.get("decoder") or {}
    return list(decoder.get("decoders", [decoder] if decoder else []))


def _rewrites(stage: Mapping[str, Any]) -> set[str]:
    """What a step of the decoder replaces by something else."""
    pattern = stage.get("pattern", {})
    return {pattern["String"]} if "String" in pattern else {stage["replacement"]} if "replacement" in stage else set()


def _spelled(character: str, byte_tokens: Collection[str]) -> bool:
    return all(_byte_token(byte) in byte_tokens for byte in character.encode("utf-8", "surrogatepass"))


def _byte_token(byte: int) -> str:
    return f"<0x{byte:02X}>"
