"""How far a model's distributions are from the dense model's, on the same tokens.

A pruned vocabulary is part of the dense one. So the text is cut into the pruned model's tokens, both models read
these, and both distributions are compared over the tokens that both have, renormalised; the probability that the dense
model put elsewhere is reported beside it. Letters: S positions, V tokens that both have.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flabc.errors import EngineError
from flabc.runtime.backend import Logits
from flabc.runtime.session import Session
from flabc.runtime.text import TextCodec

from .logits import log_sum, pieces
from .perplexity import opening, window_of, windows

Index = npt.NDArray[np.int64]


class Divergence:
    """KL(dense || subject), for many texts.

    Raises:
        EngineError: if the subject has a token that the dense model has not.
    """

    def __init__(self, dense: Session, subject: Session) -> None:
        self._dense, self._subject = dense, subject
        self._ours, self._theirs = shared_ids(subject.codec, dense.codec)
        self._map = np.full(int(self._ours.max()) + 1, -1, np.int64)
        self._map[self._ours] = self._theirs

    def measure(self, text: str) -> dict[str, float]:
        """Sums over all positions of a text.

        Returns:
            ``kl_nats``; ``outside``, the dense model's probability of tokens that the subject lacks; ``agree``, how
            often both find the same token the most likely; ``positions``.
        """
        codec = self._subject.codec
        before = opening(codec)
        ids = np.array([*before, *codec.encode_plain(text)], np.int64)
        sums = {"kl_nats": 0.0, "outside": 0.0, "agree": 0.0, "positions": 0.0}
        window, stride = min(window_of(self._dense.backend), window_of(self._subject.backend))
        for span, new in windows(len(ids), window, stride, given=len(before)):
            part = ids[span][None]  # (1, S)
            found = self._subject.backend.score(part)[0, -new - 1 : -1]
            expected = self._dense.backend.score(self._map[part])[0, -new - 1 : -1]
            for piece in pieces(expected):
                self._add(sums, expected[piece], found[piece])
        return sums

    def _add(self, sums: dict[str, float], expected: Logits, found: Logits) -> None:
        """Add logits (S, all of a side's tokens) of the same positions."""
        whole = log_sum(expected)
        # Not expected[:, ids]: that is laid out token by token, and numpy then sums a row number by number in float32.
        p, q = expected.take(self._theirs, -1), found.take(self._ours, -1)
        inside = log_sum(p)
        p, q = p - inside[:, None], q - log_sum(q)[:, None]
        sums["kl_nats"] += float((np.exp(p) * (p - q)).sum(dtype=np.float64))
        sums["outside"] += float((1 - np.exp(inside - whole)).sum(dtype=np.float64))
        sums["agree"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        sums["positions"] += len(expected)


def shared_ids(subject: TextCodec, dense: TextCodec) -> tuple[Index, Index]:
    """The subject's token ids, and the dense model's ids of the same tokens.

    Raises:
        EngineError: if the subject has a token that the dense model has not.
    """
    ours, theirs = subject.tokenizer.get_vocab(), dense.tokenizer.get_vocab()
    strange = [token for token in ours if token not in theirs]
    if strange:
        raise EngineError(
            "Models are compared over tokens that both have.",
            expected="a vocabulary that is part of the dense model's",
            found=f"{len(strange)} other tokens, such as {strange[0]!r}",
        )
    # In the order of the dense ids, so that a row of logits is read from its beginning to its end.
    pairs = sorted((theirs[token], index) for token, index in ours.items())
    return np.array([index for _, index in pairs], np.int64), np.array([index for index, _ in pairs], np.int64)
