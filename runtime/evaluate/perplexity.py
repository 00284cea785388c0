"""How well a model predicts text: perplexity and bits per byte, over strided windows.

A pruned vocabulary cuts text into other tokens, so perplexity per token does not compare across models. Bits per
byte does; so does perplexity when both are divided by one model's token count (``Perplexity.per``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, log

import numpy as np

from flabc.console import progress
from flabc.errors import CorpusError
from flabc.frozen import Frozen
from flabc.runtime.backend import Backend, Ids, Logits
from flabc.runtime.text import TextCodec

from .logits import log_sum, pieces

#: Tokens that a window holds, and how many of them are new in each window after the first. Where the model's own
#: limit is shorter, it is the window, and at most half of it is new.
WINDOW, STRIDE = 1024, 512


class Perplexity(Frozen):
    """The outcome: sums, from which every figure follows.

    Args:
        nll_nats: negative log-likelihood of the whole text.
        tokens: tokens scored.
        bytes: UTF-8 bytes of the text.
        documents: texts scored.
    """

    nll_nats: float
    tokens: int
    bytes: int
    documents: int

    @property
    def perplexity(self) -> float:
        """Per token of the model's own tokenizer."""
        return exp(self.nll_nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Independent of any tokenizer."""
        return self.nll_nats / log(2) / self.bytes

    def per(self, tokens: int) -> float:
        """Perplexity as if the text had that many tokens: the same count for two models makes them comparable."""
        return exp(self.nll_nats / tokens)


def perplexity(backend: Backend, codec: TextCodec, texts: Sequence[str]) -> Perplexity:
    """Score texts, every token of each; see ``score_text``.

    Raises:
        CorpusError: if there is no text.
    """
    if not any(texts):
        raise CorpusError("There is no text to score.")
    with progress("scoring held-out text", len(texts)) as advance:
        scores = []
        for text in texts:
            scores.append(score_text(backend, codec, text))
            advance(1)
    return Perplexity(
        nll_nats=sum(nll for nll, _ in scores),
        tokens=sum(tokens for _, tokens in scores),
        bytes=sum(len(text.encode()) for text in texts),
        documents=len(texts),
    )


def score_text(backend: Backend, codec: TextCodec, text: str, before: Sequence[int] | None = None) -> tuple[float, int]:
    """Negative log-likelihood of a text in nats, and its tokens, all of them scored.

    Args:
        backend: the model.
        codec: its tokenizer.
        text: what is scored.
        before: ids that the text follows, at least one; ``opening`` if None.
    """
    before = opening(codec) if before is None else before
    ids = [*before, *codec.encode_plain(text)]
    nll, tokens = 0.0, 0
    for span, new in windows(len(ids), *window_of(backend), given=len(before)):
        part = np.array([ids[span]], np.int64)
        nll += float(target_nll(backend.score(part)[0, -new - 1 : -1], part[0, -new:]).sum())
        tokens += new
    return nll, tokens


def opening(codec: TextCodec) -> list[int]:
    """The ids that a text is scored behind: those that the tokenizer puts there, or else a line break.

    Not a special token that the tokenizer does not put there itself. Models that are never served behind one do not
    know it as a beginning: Qwen2.5-Coder-0.5B loses 0.5 nats on every later token of a file behind its
    end-of-text token, and what is measured then is not the model that answers.
    """
    return codec.before_text() or codec.encode_plain("\n")


def window_of(backend: Backend) -> tuple[int, int]:
    """Window and stride that a model's positions allow."""
    window = min(WINDOW, backend.spec.max_position_embeddings)
    return window, min(STRIDE, window // 2)


def windows(length: int, window: int, stride: int, *, given: int = 1) -> Iterator[tuple[slice, int]]:
    """Windows over ``length`` tokens, and how many predictions at the end of each are new.

    Every token behind the ``given`` ones is predicted exactly once; all but the first window give ``window - stride``
    tokens of context. ``stride`` is less than ``window``, and ``given`` at least one and at most a window:
    a window's first token has nothing before it to be predicted from.
    """
    done = given
    end = min(window, length)
    while done < length:
        yield slice(max(0, end - window), end), end - done
        done, end = end, min(end + stride, length)


def target_nll(logits: Logits, targets: Ids) -> Logits:
    """Negative log-likelihood in nats of the token that came after each position, (S, V) and (S,) in, (S,) out."""
    nll: Logits = -logits[np.arange(len(logits)), targets]
    for piece in pieces(logits):
        nll[piece] += log_sum(logits[piece])
    return nll
