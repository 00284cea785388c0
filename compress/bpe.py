"""Byte-pair encodings: how a token is made, and which others must be kept so that it still can be.

A token is reachable only if every intermediate product of its own derivation is in the vocabulary together with
the merges that make it. Dropping one of those silently makes the token unreachable and every text that used it
longer, so a set of wanted tokens is always closed under derivation here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from flabc.errors import StageError

from .subwords import Subwords

Pair = tuple[str, str]

#: How SentencePiece writes a byte, and the beginning of a word.
BYTE_TOKEN, SPACE = re.compile(r"<0x[0-9A-F]{2}>"), "\u2581"


@dataclass(frozen=True)
class BytePairs(Subwords):
    """The model part of a BPE ``tokenizer.json``: over bytes, or over characters with byte tokens to fall back on.

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
            StageError: if it is not one that gives every text back.
        """
        model = tokenizer["model"]
        if not (model.get("byte_fallback") or _is_byte_level(tokenizer)):
            raise StageError(
                "A BPE that knows no bytes would lose text once tokens are removed.",
                expected="a byte-level BPE, or one with byte_fallback",
                fix="Leave the vocab stage away.",
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
    def byte_tokens(self) -> frozenset[int]:
        """Ids of the tokens that stand for a byte where a character is not in the vocabulary, ``<0x0A>``."""
        return frozenset(index for token, index in self.vocab.items() if BYTE_TOKEN.fullmatch(token))

    @cached_property
    def symbols(self) -> frozenset[int]:
        """Ids of the bytes: the characters that stand for them, or the byte tokens and the mark of a space."""
        if len(self.byte_tokens) == 256:
            return self.byte_tokens | {self.vocab[mark] for mark in (SPACE,) if mark in self.vocab}
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
            token = "" if index in self.byte_tokens else self.token_of.get(index, "")
            made = self.derivation(token) or []
            self._intermediates[index] = frozenset(self.vocab[part] for pair in made for part in pair)
        return self._intermediates[index]

    def by_rank(self) -> Iterator[int]:
        """The products of the merges, the first merge first."""
        for left, right in self.merges:
            index = self.vocab[left + right]
            if self.intermediates(index):
                yield index

    def remapped(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The vocabulary and the merges whose parts and product are all kept."""
        ordered = sorted(self.vocab.items(), key=lambda item: item[1])
        return {
            "vocab": {token: new_ids[old] for token, old in ordered if old in new_ids},
            "merges": [list(pair) for pair in self.surviving_merges(set(new_ids))],
        }

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
