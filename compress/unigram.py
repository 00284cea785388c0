"""Unigram tokenizers (Kudo, 2018): pieces with scores; a text becomes the pieces whose scores sum highest.

Without some pieces, the best way to write a text in the others is still the best, so a kept piece needs no other.
Two things make that exact in the ``tokenizers`` library. An unknown character costs ten more than the worst piece,
so the worst score stays. And a character without a piece is unknown: with byte fallback it is written in bytes;
without it it is lost, so there every single-character piece stays, and a text comes back as it did before if each
of its characters is such a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .subwords import Subwords, alphabet


@dataclass(frozen=True)
class Unigram(Subwords):
    """The model part of a Unigram ``tokenizer.json``.

    Args:
        pieces: piece and score (a log-probability) in the order of their ids.
        letters: ids of byte tokens, and of characters that nothing could stand for.
        unknown: the id that stands for unknown characters, or None.
    """

    pieces: Sequence[tuple[str, float]]
    letters: frozenset[int]
    unknown: int | None = None

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> Unigram:
        """Read the content of a ``tokenizer.json`` whose model is a Unigram."""
        model = tokenizer["model"]
        pieces = [(piece, score) for piece, score in model["vocab"]]
        vocab = {piece: index for index, (piece, _) in enumerate(pieces)}
        return cls(pieces, alphabet(vocab, tokenizer), model.get("unk_id"))

    @cached_property
    def symbols(self) -> frozenset[int]:
        """Bytes and characters that stay, the unknown token, and a piece of the worst score."""
        worst = min(range(len(self.pieces)), key=lambda index: self.pieces[index][1])
        return self.letters | {worst} | ({self.unknown} if self.unknown is not None else set())

    def needs(self, index: int) -> frozenset[int]:
        """Nothing: a piece is found as it is."""
        return frozenset()

    def natural_order(self) -> Iterator[int]:
        """The most probable pieces first."""
        yield from sorted(range(len(self.pieces)), key=lambda index: (-self.pieces[index][1], index))

    def cut(self, keep: Sequence[int]) -> dict[str, Any]:
        """The kept pieces, and the new id of the unknown token."""
        pieces = [list(self.pieces[old]) for old in keep if old < len(self.pieces)]
        return {"vocab": pieces, "unk_id": None if self.unknown is None else keep.index(self.unknown)}
