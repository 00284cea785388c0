"""What is measured: a model folder opened here, or a server that speaks OpenAI's API."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flabc.errors import EngineError, require
from flabc.runtime.answer import StopFilter
from flabc.runtime.backend import Limits
from flabc.runtime.batch import generate_batch
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session
from flabc.runtime.text import Message, TextCodec

from .task import EvalOptions

Prompt = str | Sequence[Message]

#: Tokens that a sequence may have, prompt and answer together; never more than the model has positions.
MAX_LENGTH = 4096

#: OpenAI's API takes no more stop texts than these; all of them are looked for here anyway.
SERVER_STOPS = 4

#: The environment variable that holds a server's key, as OpenAI's client names it.
API_KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Said:
    """An answer; ``refused`` if the prompt left no room for one."""

    text: str
    tokens: int | None
    finish_reason: str


class Subject(Protocol):
    """Whatever answers prompts."""

    def answers(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Said]]:
        """Answer all prompts: (a prompt's index, its answer), as they finish."""
        ...


class Local:
    """A model folder in this process.

    Args:
        folder: what ``Session.open`` takes.
        options: batch, threads and dtype.
        prompts: what will be asked, if it is known: the cache is then no larger than that needs.
    """

    def __init__(self, folder: Path, options: EvalOptions, prompts: Sequence[Prompt] = ()) -> None:
        length = MAX_LENGTH
        if prompts:
            codec = TextCodec(folder)
            longest = max(len(codec.encode(p if isinstance(p, str) else codec.render(p))) for p in prompts)
            length = min(MAX_LENGTH, longest + options.max_tokens)
        limits = Limits(options.batch, length, threads=options.threads, dtype=options.dtype)
        self.session = Session.open(folder, limits=limits)

    def answers(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Said]]:
        """Answer all prompts in batches."""
        encoded = [self.session.encode(prompt) for prompt in prompts]
        fits = [0 < len(ids) < self.session.backend.limits.max_length for ids in encoded]
        yield from ((index, Said("", 0, "refused")) for index, fit in enumerate(fits) if not fit)
        rows = [index for index, fit in enumerate(fits) if fit]
        for row, found in generate_batch(self.session, [encoded[i] for i in rows], [params[i] for i in rows]):
            yield rows[row], Said(found.text, len(found.token_ids), found.finish_reason)


class Server:
    """A model behind an OpenAI-compatible API; the key comes from the environment (``API_KEY``)."""

    def __init__(self, url: str, options: EvalOptions) -> None:
        openai: Any = require("openai", "eval")
        base = url.rstrip("/")
        self.url = base if base.endswith("/v1") else f"{base}/v1"
        self._failure: Any = openai.OpenAIError
        self._client = openai.OpenAI(base_url=self.url, api_key=os.environ.get(API_KEY, "none"))
        self._at_once = options.batch
        self.model = self._asked(lambda: self._client.models.list().data[0].id)

    def answers(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Iterator[tuple[int, Said]]:
        """Answer all prompts, several requests at once."""
        with ThreadPoolExecutor(self._at_once) as pool:
            jobs = {pool.submit(self._answer, prompts[index], params[index]): index for index in range(len(prompts))}
            try:
                for job in as_completed(jobs):
                    yield jobs[job], job.result()
            finally:
                for job in jobs:
                    job.cancel()

    def token_logprobs(self, text: str) -> list[float]:
        """Log-probability in nats of each token of a text but the first, by ``echo``.

        Raises:
            EngineError: if the server does not give them.
        """
        reply = self._asked(
            lambda: self._client.completions.create(
                model=self.model, prompt=text, max_tokens=1, temperature=0, echo=True, logprobs=1
            )
        )
        given = reply.choices[0].logprobs
        if given is None or given.token_logprobs is None or len(given.token_logprobs) < 3:
            raise EngineError(f"{self.url} gives no log-probabilities of the prompt.", expected="echo with logprobs")
        return [float(value) for value in given.token_logprobs[1:-1]]  # the last token is the one produced

    def _answer(self, prompt: Prompt, params: SamplingParams) -> Said:
        drawn = {
            "model": self.model,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
            "stop": list(params.stop[:SERVER_STOPS]) or None,
        }
        if isinstance(prompt, str):
            reply = self._asked(lambda: self._client.completions.create(prompt=prompt, **drawn))
            text = reply.choices[0].text
        else:
            reply = self._asked(lambda: self._client.chat.completions.create(messages=list(prompt), **drawn))
            text = reply.choices[0].message.content or ""
        cut = StopFilter(params.stop)
        text = cut.push(text) + cut.flush()
        tokens = reply.usage.completion_tokens if reply.usage else None
        return Said(text, tokens, "stop" if cut.stopped else str(reply.choices[0].finish_reason))

    def _asked(self, call: Any) -> Any:
        try:
            return call()
        except (self._failure, IndexError) as error:
            raise EngineError(f"The server at {self.url} does not answer as OpenAI's API does: {error}") from error


def is_url(target: str) -> bool:
    """Whether a target is a server."""
    return target.startswith(("http://", "https://"))
