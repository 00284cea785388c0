"""Session: an opened engine that answers prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flabc.artifact import Artifact
from flabc.errors import EngineError
from flabc.spec import ModelSpec

from .answer import Answer, FinishReason, Generation
from .backend import RUNS, Backend, Limits, open_backend
from .sampling import Sampler, SamplingParams, Token
from .text import Message, TextCodec


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it streams; ``finish_reason`` is set on the last."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish_reason: FinishReason | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The ids of its tokens."""
        return tuple(token.id for token in self.tokens)


class Session:
    """An opened model folder: tokenizer, backend, limits."""

    def __init__(self, backend: Backend, codec: TextCodec) -> None:
        self.backend = backend
        self.codec = codec

    @classmethod
    def open(cls, folder: Path | str, *, backend: str = "auto", limits: Limits | None = None) -> Session:
        """Open an engine (verified, ONNX Runtime) or a model folder (torch).

        Args:
            folder: an engine or checkpoint of flabc, or any Hugging Face folder of a known family.
            backend: a key of ``BACKENDS``, or ``auto``.
            limits: how much may be held; never more tokens than the model has positions.

        Raises:
            ArtifactError: if the folder is damaged or is no model.
            EngineError: if the backend cannot run it.
            MissingExtraError: if the backend is not installed.
        """
        folder, limits = Path(folder), limits or Limits()
        spec, runs = _read_spec(folder)
        name = backend if backend != "auto" else runs
        bounded = replace(limits, max_length=min(limits.max_length, spec.max_position_embeddings))
        return cls(open_backend(name, folder, spec, bounded), TextCodec(folder))

    @property
    def spec(self) -> ModelSpec:
        """The shapes of the model."""
        return self.backend.spec

    def generate(self, prompt: str | Sequence[Message], params: SamplingParams | None = None) -> Generation:
        """Answer a prompt, or a conversation through the model's chat template.

        Raises:
            EngineError: if the prompt is empty or leaves no room for an answer.
        """
        ids, params = self.encode(prompt), params or SamplingParams()
        answer = self.answer(ids, params)
        for token in self.tokens(ids, params):
            answer.take(token)
            if answer.finish_reason:
                break
        return answer.generation()

    def stream(self, prompt: str | Sequence[Message], params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; every piece is whole characters, none is part of a stop text."""
        ids, params = self.encode(prompt), params or SamplingParams()
        answer = self.answer(ids, params)
        for token in self.tokens(ids, params):
            yield Chunk(answer.take(token), (token,), answer.finish_reason)
            if answer.finish_reason:
                return

    def tokens(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """The answer's tokens, one at a time, end-of-sequence included; stop texts are not looked for.

        Raises:
            EngineError: if the prompt is empty or leaves no room for an answer.
        """
        room = self.room(prompt_ids)
        draw = Sampler(params, prompt_ids)
        self.backend.start(1)
        new = np.array([prompt_ids], np.int64)
        for _ in range(min(params.max_tokens, room)):
            token = draw(self.backend.extend(new, np.array([new.shape[1]]))[0])
            yield token
            if token.id in self.codec.eos_ids and not params.ignore_eos:
                return
            new = np.array([[token.id]], np.int64)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt, or of a conversation through the chat template."""
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        return self.codec.encode_plain(self.codec.render(prompt))

    def answer(self, prompt_ids: Sequence[int], params: SamplingParams) -> Answer:
        """An answer with no tokens yet."""
        return Answer(self.codec, params, len(prompt_ids), self.room(prompt_ids))

    def room(self, prompt_ids: Sequence[int]) -> int:
        """Tokens that an answer can have.

        Raises:
            EngineError: if the prompt is empty or leaves no room.
        """
        if not prompt_ids:
            raise EngineError("The prompt is empty.", expected="at least one token")
        room = self.backend.limits.max_length - len(prompt_ids)
        if room < 1:
            raise EngineError(
                f"The prompt has {len(prompt_ids)} tokens.",
                expected=f"fewer than {self.backend.limits.max_length}",
                fix="Shorten it, or open the engine with a larger --max-length.",
            )
        return room


def _read_spec(folder: Path) -> tuple[ModelSpec, str]:
    """The spec of a model folder, and the backend that runs it."""
    if Artifact.is_at(folder):
        artifact = Artifact.open(folder)
        manifest = artifact.manifest
        return artifact.model, RUNS[manifest.target or "onnx"] if manifest.kind == "engine" else "torch"
    config = folder / "config.json"
    if not config.is_file():
        raise EngineError(f"{folder} is no model.", expected="an engine or checkpoint of flabc, or a config.json")
    return ModelSpec.from_config(json.loads(config.read_text(encoding="utf-8"))), "torch"
