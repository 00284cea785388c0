"""Session: an opened engine that answers prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from flabc.artifact import Artifact
from flabc.errors import EngineError
from flabc.spec import ModelSpec

from .backend import Backend, Limits, open_backend
from .sampling import SamplingParams, sampler
from .text import Message, TextCodec, until_stop

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Chunk:
    """A piece of an answer as it streams; ``finish_reason`` is set on the last."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


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
        spec, kind = _read_spec(folder)
        name = backend if backend != "auto" else {"engine": "onnxruntime"}.get(kind, "torch")
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
        ids = self.encode(prompt)
        chunks = list(self._chunks(ids, params or SamplingParams()))
        return Generation(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(index for chunk in chunks for index in chunk.token_ids),
            finish_reason=chunks[-1].finish_reason or "length",
            prompt_tokens=len(ids),
        )

    def stream(self, prompt: str | Sequence[Message], params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Answer a prompt piece by piece; every piece is whole characters, none is part of a stop text."""
        yield from self._chunks(self.encode(prompt), params or SamplingParams())

    def tokens(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """The answer's token ids, one at a time, end-of-sequence included."""
        if not prompt_ids:
            raise EngineError("The prompt is empty.", expected="at least one token")
        room = self.backend.limits.max_length - len(prompt_ids)
        if room < 1:
            raise EngineError(
                f"The prompt has {len(prompt_ids)} tokens.",
                expected=f"fewer than {self.backend.limits.max_length}",
                fix="Shorten it, or open the engine with a larger --max-length.",
            )
        draw = sampler(params)
        self.backend.start(1)
        new = np.array([prompt_ids], np.int64)
        for _ in range(min(params.max_tokens, room)):
            token = draw(self.backend.extend(new, np.array([new.shape[1]]))[0])
            yield token
            if token in self.codec.eos_ids and not params.ignore_eos:
                return
            new = np.array([[token]], np.int64)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Token ids of a prompt, or of a conversation through the chat template."""
        if isinstance(prompt, str):
            return self.codec.encode(prompt)
        return self.codec.encode_plain(self.codec.render(prompt))

    def _chunks(self, ids: Sequence[int], params: SamplingParams) -> Iterator[Chunk]:
        drawn: list[int] = []

        def watched() -> Iterator[int]:
            for token in self.tokens(ids, params):
                drawn.append(token)
                yield token

        taken, stopped = 0, False
        for text, stopped in until_stop(self.codec.pieces(watched()), params.stop):
            if text or stopped:
                yield Chunk(text, tuple(drawn[taken:]))
                taken = len(drawn)
        ended = stopped or bool(drawn and drawn[-1] in self.codec.eos_ids and not params.ignore_eos)
        yield Chunk("", tuple(drawn[taken:]), "stop" if ended else "length")


def _read_spec(folder: Path) -> tuple[ModelSpec, str]:
    """The spec of a model folder, and what kind of folder it is."""
    if Artifact.is_at(folder):
        manifest = Artifact.open(folder).manifest
        if manifest.spec is None:
            raise EngineError(f"{folder} is a {manifest.kind}, which cannot be run.")
        return manifest.spec, manifest.kind
    config = folder / "config.json"
    if not config.is_file():
        raise EngineError(f"{folder} is no model.", expected="an engine or checkpoint of flabc, or a config.json")
    return ModelSpec.from_config(json.loads(config.read_text(encoding="utf-8"))), "model"
