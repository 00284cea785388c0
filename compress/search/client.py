"""Language models that the operator ``llm`` can ask: an OpenAI-compatible endpoint, or a recorded transcript."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from flabc.errors import LanguageModelError, UsageError, require

from .journal import Reply
from .llm import Client, Message

#: Seconds that one answer may take.
TIMEOUT_S = 600.0


class Line(BaseModel):
    """A line of a transcript."""

    model_config = ConfigDict(extra="forbid")

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


def endpoint(url: str, model: str, seed: int) -> Client:
    """A model behind an OpenAI-compatible chat endpoint; the key is OPENAI_API_KEY's, if there is one.

    Raises:
        MissingExtraError: if the package ``openai`` is not installed.
    """
    openai = require("openai", "search")
    asks = openai.OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=TIMEOUT_S)

    def ask(messages: Sequence[Message]) -> Reply:
        try:
            said: Any = asks.chat.completions.create(model=model, messages=list(messages), seed=seed)
        except openai.OpenAIError as error:
            raise LanguageModelError(
                f"The language model {model} at {url} does not answer: {error}",
                fix="Go on with --resume when it does, or give --fallback evolution.",
            ) from error
        if not said.choices or said.choices[0].message.content is None:
            raise LanguageModelError(f"The language model {model} at {url} gave an answer without text.")
        used = said.usage
        tokens = (used.prompt_tokens, used.completion_tokens) if used else (0, 0)
        return Reply(said.choices[0].message.content, *tokens)

    return ask


def transcript(file: Path, heard: int) -> Client:
    """Replies that were recorded, one JSON object a line, in their order whatever is asked.

    Args:
        file: the transcript of a search, ``transcript.jsonl`` in its folder.
        heard: lines that the journal knows already.

    Raises:
        UsageError: if a line is not one of a transcript.
    """
    try:
        lines = [Line.model_validate_json(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValidationError as error:
        raise UsageError(f"{file} is not a transcript: {error.errors()[0]['msg']}.") from error
    rest = iter(lines[heard:])

    def ask(_: Sequence[Message]) -> Reply:
        line = next(rest, None)
        if line is None:
            raise LanguageModelError(
                f"The transcript {file} has no more replies than {len(lines)}.",
                fix="Ask for fewer --evaluations, or give --fallback evolution.",
            )
        return Reply(**line.model_dump())

    return ask
