"""An answer while it grows: text that is certain, stop texts, and the reason why it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .sampling import SamplingParams, Token
from .text import TextCodec

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Generation:
    """A whole answer; ``logprobs`` has an entry per token if they were asked for."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[Token, ...] | None = None


class StopFilter:
    """Passes text on until a stop text is complete; text that may be the beginning of one is held back.

    Of several the first to be complete counts, and of those that end together the longest: whatever pieces the text
    comes in, it ends at the same place.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stopped = False
        self._stop = [text for text in stop if text]
        self._held = ""

    def push(self, piece: str) -> str:
        """What may be shown after one more piece; nothing more once ``stopped``."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(at + len(text), at) for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            _, begin = min(found)
            return self._held[:begin]
        keep = max((_overlap(self._held, text) for text in self._stop), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        return shown

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop text."""
        return "" if self.stopped else self._held


class Answer:
    """One answer as its tokens come in.

    Args:
        codec: the model's text.
        params: stop texts, and whether the end-of-sequence token counts.
        prompt_tokens: tokens of the prompt.
        room: tokens that the answer may have at most.
    """

    def __init__(self, codec: TextCodec, params: SamplingParams, prompt_tokens: int, room: int) -> None:
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self._eos_ids = frozenset[int]() if params.ignore_eos else codec.eos_ids
        self._room = min(params.max_tokens, room)
        self._prompt_tokens = prompt_tokens
        self._scored = params.logprobs is not None
        self._decoder = codec.decoder()
        self._filter = StopFilter(params.stop)
        self._shown: list[str] = []

    def take(self, token: Token) -> str:
        """Take the next token; the text that became certain. ``finish_reason`` is set if it was the last."""
        self.tokens.append(token)
        text = self._filter.push(self._decoder(token.id))
        if self._filter.stopped or token.id in self._eos_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self._room:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._filter.flush()
        self._shown.append(text)
        return text

    def generation(self) -> Generation:
        """The answer as a whole."""
        text = "".join(self._shown)
        ids, scored = tuple(token.id for token in self.tokens), tuple(self.tokens) if self._scored else None
        return Generation(text, ids, self.finish_reason or "length", self._prompt_tokens, scored)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
