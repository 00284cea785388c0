"""Byte-pair encodings: how a token is made, and which others must be kept so that it still can be.

A token is reachable only if every intermediate product of its own derivation is in the vocabulary together with
the merges that make it. Dropping one of those silently makes the token unreachable and every text that used it
longer, so a set of wanted tokens is always closed under derivation here.

That holds for byte-level BPE (GPT-2, Qwen2, StarCoder) and for SentencePiece's BPE with byte fallback (Llama 2,
CodeLlama, Gemma), where a character that is gone falls back to its bytes. Where merges are ignored for whole words
(``ignore_merges``, Llama 3), a kept word is found without a derivation, but as part of a longer word it is still
only made by merges: it needs the same tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from flabc.errors import StageError

from .subwords import Subwords, alphabet

Pair = tuple[str, str]


@dataclass(frozen=True)
class BytePairs(Subwords):
    """The model part of a BPE ``tokenizer.json``.

    Args:
        vocab: token to id.
        merges: pairs of tokens in the order of their rank.
        letters: ids that stay; None: all single characters.
    """

    vocab: Mapping[str, int]
    merges: Sequence[Pair]
    letters: frozenset[int] | None = None

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> BytePairs:
        """Read the content of a ``tokenizer.json`` whose model is a BPE.

        Raises:
            StageError: if its tokens are spelled differently inside a word and at its end (GPT-1, CLIP).
        """
        model = tokenizer["model"]
        for key in ("continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise StageError("The vocabulary stage does not cut this BPE.", found=f"{key} {model[key]!r}")
        return cls(model["vocab"], [_pair(merge) for merge in model["merges"]], alphabet(model["vocab"], tokenizer))

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """The rank of every merge; the lowest is applied first."""
        return {pair: rank for rank, pair in enumerate(self.merges)}

    @cached_property
    def token_of(self) -> dict[int, str]:
        """Id to token."""
        return {index: token for token, index in self.vocab.items()}

    @cached_property
    def _needs(self) -> dict[int, frozenset[int]]:
        return {}

    @cached_property
    def symbols(self) -> frozenset[int]:
        """Ids of what every text can fall back on: the bytes, and characters that have none."""
        if self.letters is not None:
            return self.letters
        return frozenset(index for token, index in self.vocab.items() if len(token) == 1)

    def derivation(self, token: str) -> list[Pair] | None:
        """The merges that make ``token`` out of its characters, in order; None if they never make it."""
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

    def needs(self, index: int) -> frozenset[int]:
        """Ids of the tokens that a token is made of on the way; none for a symbol, or if merges never make it.

        An added token may lie outside the vocabulary (Qwen2.5, Llama 3): no merge makes it.
        """
        if index not in self._needs:
            made = self.derivation(self.token_of.get(index, "")) or []
            self._needs[index] = frozenset(self.vocab[part] for pair in made for part in pair)
        return self._needs[index]

    def natural_order(self) -> Iterator[int]:
        """What the earliest merges make; then all from the shortest, since a token is made of shorter ones."""
        yield from (self.vocab[left + right] for left, right in self.merges)
        yield from sorted(self.vocab.values(), key=lambda index: (len(self.token_of[index]), index))

    def surviving_merges(self, kept: Collection[int]) -> list[Pair]:
        """The merges whose parts and product are all kept, in order."""

        def alive(pair: Pair) -> bool:
            return all(self.vocab[token] in kept for token in (*pair, pair[0] + pair[1]))

        return [pair for pair in self.merges if alive(pair)]

    def cut(self, keep: Sequence[int]) -> dict[str, Any]:
        """Vocabulary and merges over these ids."""
        tokens = [(self.token_of[old], new) for new, old in enumerate(keep) if old in self.token_of]
        return {"vocab": dict(tokens), "merges": [list(pair) for pair in self.surviving_merges(set(keep))]}


def _pair(merge: Any) -> Pair:
    """A merge as older files write it ("a b") or newer ones (["a", "b"])."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
