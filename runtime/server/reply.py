"""What is sent back: choices, log-probabilities, usage, whole or as a stream of events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from flabc.errors import FlabcError
from flabc.runtime.sampling import Token
from flabc.runtime.session import Chunk
from flabc.runtime.text import TextCodec

from . import problem
from .exchange import Exchange


@dataclass
class Choice:
    """One answer as it grows; ``offset`` is where its next token's text begins."""

    finish_reason: str | None = None
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offset: int = 0


class Reply:
    """The reply to a request.

    Args:
        codec: the model's text.
        model: its name.
        chat: whether it is a chat's.
        scored: whether log-probabilities were asked for.
        echoes: for each answer its prompt and the prompt's tokens, as far as they are sent back.
    """

    def __init__(
        self, codec: TextCodec, model: str, *, chat: bool, scored: bool, echoes: Sequence[tuple[str, list[Token]]]
    ) -> None:
        self._codec, self._chat, self._scored, self._echoes = codec, chat, scored, echoes
        kind = "chatcmpl" if chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, exchange: Exchange) -> dict[str, Any]:
        """Wait for all answers.

        Raises:
            FlabcError: if one of them cannot be whole.
        """
        choices = [Choice(None, text, list(tokens)) for text, tokens in self._echoes]
        async for index, _ in exchange.pieces():
            answer = exchange.jobs[index].answer
            choices[index].text += answer.generation().text
            choices[index].tokens += answer.tokens
            choices[index].finish_reason = answer.finish_reason
        name = "chat.completion" if self._chat else "text_completion"
        listed = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self._head, "object": name, "choices": listed, "usage": usage(exchange)}

    async def events(self, exchange: Exchange, *, with_usage: bool) -> AsyncIterator[str]:
        """The answers as server-sent events, as they come; an error is the last event if there is one."""
        choices = [Choice() for _ in self._echoes]
        try:
            for index, (text, tokens) in enumerate(self._echoes):
                if self._chat or text:
                    yield self._event(index, choices[index], Chunk(text, tuple(tokens)), opening=True)
            async for index, chunk in exchange.pieces():
                if chunk.text or chunk.finish_reason or self._scored:
                    yield self._event(index, choices[index], chunk)
            for index, choice in enumerate(choices):
                if choice.finish_reason is None:  # nothing was to be produced
                    yield self._event(index, choice, Chunk("", finish_reason="length"))
            if with_usage:
                yield _line({**self._head, "object": self._piece_name, "choices": [], "usage": usage(exchange)})
            yield "data: [DONE]\n\n"
        except FlabcError as error:
            yield _line(problem.of(error)[1])

    @property
    def _piece_name(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _event(self, index: int, choice: Choice, chunk: Chunk, *, opening: bool = False) -> str:
        choice.finish_reason = chunk.finish_reason
        piece: dict[str, Any] = {"index": index, "finish_reason": chunk.finish_reason, "logprobs": None}
        if self._scored and chunk.tokens:
            piece["logprobs"] = self._logprobs(chunk.tokens, choice)
        if self._chat:
            opened = {"role": "assistant", "content": ""}
            piece["delta"] = opened if opening else {"content": chunk.text} if chunk.text else {}
        else:
            piece["text"] = chunk.text
        return _line({**self._head, "object": self._piece_name, "choices": [piece]})

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": choice.text}} if self._chat else {"text": choice.text}
        logprobs = self._logprobs(choice.tokens, choice) if self._scored else None
        return {"index": index, "finish_reason": choice.finish_reason or "length", "logprobs": logprobs, **said}

    def _logprobs(self, tokens: Sequence[Token], choice: Choice) -> dict[str, Any]:
        return self._chat_logprobs(tokens) if self._chat else self._text_logprobs(tokens, choice)

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(index: int, logprob: float | None) -> dict[str, Any]:
            text = self._codec.piece(index)
            # The bytes of half a character are not known here.
            return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}

        return {
            "content": [
                {**entry(token.id, token.logprob), "top_logprobs": [entry(*each) for each in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _text_logprobs(self, tokens: Sequence[Token], choice: Choice) -> dict[str, Any]:
        texts = [self._codec.piece(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if token.logprob is None else self._by_text(token) for token in tokens],
            "text_offset": offsets,
        }

    def _by_text(self, token: Token) -> dict[str, float]:
        """The most likely tokens and the one itself; of several with one text, which are bytes, the most likely."""
        found: dict[str, float] = {}
        for index, logprob in [*token.top, (token.id, token.logprob or 0.0)]:
            text = self._codec.piece(index)
            found[text] = max(logprob, found.get(text, logprob))
        return found


def usage(exchange: Exchange) -> dict[str, Any]:
    """Tokens of a request: each prompt counts once, however many answers it has."""
    produced = sum(len(job.answer.tokens) for job in exchange.jobs.values())
    return {
        "prompt_tokens": exchange.prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": exchange.prompt_tokens + produced,
        "prompt_tokens_details": {"cached_tokens": exchange.cached_tokens},
    }


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
