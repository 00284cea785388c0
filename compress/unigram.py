"""Unigram vocabularies: pieces with scores, of which a text takes the most likely sequence.

No piece is made of others, so any set can be kept: a sequence whose pieces are all kept was the best of more, and is
the best of what is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flabc.errors import StageError

from .bpe import BYTE_TOKEN
from .subwords import Subwords


@dataclass(frozen=True)
class Pieces(Subwords):
    """The model part of a Unigram ``tokenizer.json``.

    Args:
        scored: pieces and their log-probabilities; a piece's place is its id.
        unk_id: the piece for what no piece covers, if there is one.
    """

    scored: Sequence[tuple[str, float]]
    unk_id: int | None

    @classmethod
    def of(cls, tokenizer: Mapping[str, Any]) -> Pieces:
        """Read the content of a ``tokenizer.json``.

        Raises:
            StageError: if its added tokens lie between its pieces, whose places are their ids.
        """
        model = tokenizer["model"]
        return cls([(str(piece), float(score)) for piece, score in model["vocab"]], model.get("unk_id"))

    @cached_property
    def symbols(self) -> frozenset[int]:
        """Ids of the bytes, of every single character, of the unknown piece, and of the least likely piece.

        The price of an unknown character hangs on the least likely piece; without it other pieces would be chosen.
        """
        short = {
            index for index, (piece, _) in enumerate(self.scored) if len(piece) == 1 or BYTE_TOKEN.fullmatch(piece)
        }
        least = min(range(len(self.scored)), key=lambda index: self.scored[index][1])
        return frozenset(short | {least} | ({self.unk_id} if self.unk_id is not None else set()))

    def intermediates(self, index: int) -> frozenset[int]:
        """None: a piece is taken as a whole."""
        return frozenset()

    def by_rank(self) -> Iterable[int]:
        """The most likely pieces first."""
        return sorted(range(len(self.scored)), key=lambda index: -self.scored[index][1])

    def remapped(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """The pieces that are kept, and where the unknown one is now.

        Raises:
            StageError: if a piece would not lie at its id.
        """
        kept = [(old, piece) for old, piece in enumerate(self.scored) if old in new_ids]
        if any(new_ids[old] != place for place, (old, _) in enumerate(kept)):
            raise StageError("The ids of this Unigram tokenizer's pieces are not their places.")
        unknown = {} if self.unk_id is None else {"unk_id": new_ids[self.unk_id]}
        return {"vocab": [list(piece) for _, piece in kept], **unknown}
