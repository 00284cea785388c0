"""Byte-pair encodings: how a token is made, and which others must be kept so that it still can be.

A token is reachable only if every intermediate product of its own derivation is in the vocabulary together with
the merges that make it. Dropping one of those silently makes the token unreachable and every text that used it
longer, so a set of wanted tokens is always closed under derivation here.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from flabc.errors import StageError

Pair = tuple[str, str]


@dataclass(frozen=True)
class BytePairs:
    """The model part of a byte-level BPE ``tokenizer.json``.

    Args:
        vocab: token to id.
        merges: pairs of tokens in the order of their rank.
    """

    vocab: Mapping[str, int]
    merges: Sequence[Pair]

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> BytePairs:
        """Read the content of a ``tokenizer.json``.

        Raises:
            StageError: if it is not a byte-level BPE.
        """
        model = tokenizer["model"]
        if model["type"] != "BPE" or model.get("byte_fallback") or not _is_byte_level(tokenizer):
            raise StageError(
                "The vocabulary stage works on byte-level BPE tokenizers.",
                found=f"{model['type']}{' with byte fallback' if model.get('byte_fallback') else ''}",
            )
        merges = [_pair(merge) for merge in model["merges"]]
        return cls(model["vocab"], merges)

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """The rank of every merge; the lowest is applied first."""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def token_of(self) -> dict[int, str]:
        """Id to token."""
        return {index: token for token, index in self.vocab.items()}

    @cached_property
    def _intermediates(self) -> dict[int, frozenset[int]]:
        return {}

    @cached_property
    def symbols(self) -> frozenset[int]:
        """Ids of the single-character tokens: the bytes, which every text can fall back on."""
        return frozenset(index for token, index in self.vocab.items() if len(token) == 1)

    def derivation(self, token: str) -> list[Pair] | None:
        """The merges that make ``token`` out of its bytes, in order; None if they never make it."""
        parts, made = list(token), []
        while len(parts) > 1:
            ranked = [(self.ranks.get(pair), at) for at, pair in enumerate(pairwise(parts))]
            best = min(((rank, at) for rank, at in ranked if rank is not None), default=None)
            if best is None:
                return None
            at = best[1]
            made.append((parts[at], parts[at + 1]))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return made

    def intermediates(self, index: int) -> frozenset[int]:
        """Ids of the tokens that a token is made of on the way; none for a byte, or if merges never make it.

        An added token may lie outside the vocabulary (Qwen2.5, Llama 3): no merge makes it.
        """
        if index not in self._intermediates:
            made = self.derivation(self.token_of.get(index, "")) or []
            self._intermediates[index] = frozenset(self.vocab[part] for pair in made for part in pair)
        return self._intermediates[index]

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
                these come the earliest merges that kept tokens can make.
        """
        grown = set(kept)
        for index in first:
            made = self.intermediates(index) | {index}
            if len(grown | made) <= size:
                grown |= made
            if len(grown) == size:
                break
        for left, right in self.merges:
            if len(grown) >= size:
                break
            index, parts = self.vocab[left + right], {self.vocab[left], self.vocab[right]}
            if parts <= grown and self.intermediates(index) and self.intermediates(index) <= grown:
                grown.add(index)
        return grown

    def surviving_merges(self, kept: set[int]) -> list[Pair]:
        """The merges whose parts and product are all kept, in order."""

        def alive(pair: Pair) -> bool:
            return all(self.vocab[token] in kept for token in (*pair, pair[0] + pair[1]))

        return [pair for pair in self.merges if alive(pair)]


def _pair(merge: Any) -> Pair:
    """A merge as older files write it ("a b") or newer ones (["a", "b"])."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    stages = [tokenizer.get("pre_tokenizer") or {}, tokenizer.get("decoder") or {}]
    flat = [part for stage in stages for part in [stage, *stage.get("pretokenizers", []), *stage.get("decoders", [])]]
    return any(part.get("type") == "ByteLevel" for part in flat)
