"""Many prompts through one backend: they share every read of the weights, and leave the batch as they finish."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from flabc.errors import UsageError

from .answer import Answer, Generation
from .backend import Ids, Logits
from .sampling import Sampler, SamplingParams, sampler
from .session import Session

#: Prompt tokens, padding included, that are computed at once: enough to keep the cores busy, few enough that
#: activations stay small and sequences that run are not held up for long.
PREFILL_TOKENS = 2048


@dataclass
class _Running:
    """A sequence in the batch."""

    index: int
    answer: Answer
    draw: Sampler

    def step(self, logits: Logits) -> int:
        """Draw the next token from (V,) logits."""
        token = self.draw(logits)
        self.answer.take(token)
        return token


def generate_batch(
    session: Session, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> Iterator[tuple[int, Generation]]:
    """Answer all prompts, as many at once as the session's ``max_batch`` allows, longest first.

    A sequence joins when there is room and leaves when it is finished. What it answers does not depend on its
    company beyond rounding: each has its own random state and its own stop texts.

    Args:
        session: an opened engine.
        prompts: token ids of each prompt.
        params: how each is answered.

    Yields:
        (the prompt's index, its answer), in the order in which they finish.

    Raises:
        UsageError: if there are not as many params as prompts.
        EngineError: if a prompt is empty or leaves no room for an answer; before anything is computed.
    """
    if len(prompts) != len(params):
        raise UsageError(f"There are {len(prompts)} prompts and {len(params)} sampling params.")
    answers = [session.answer(ids, param) for ids, param in zip(prompts, params, strict=True)]
    # Neighbours of like length waste little on padding; the longest first, so that the last to run are short.
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    running: list[_Running] = []
    tokens: list[int] = []  # the last of each that runs
    session.backend.start(0)
    while waiting or running:
        while joining := _next(waiting, prompts, session.backend.limits.max_batch - len(running)):
            logits = session.backend.join(*_padded([prompts[index] for index in joining]))
            new = [_Running(index, answers[index], sampler(params[index])) for index in joining]
            tokens += [each.step(row) for each, row in zip(new, logits, strict=True)]
            running += new
        finished = [each for each in running if each.answer.finish_reason]
        if finished:
            rows = _compact([each.answer.finish_reason is None for each in running])
            session.backend.keep(rows)
            running, tokens = [running[row] for row in rows], [tokens[row] for row in rows]
            yield from ((each.index, each.answer.generation()) for each in finished)
        elif running:
            logits = session.backend.extend(np.array(tokens, np.int64)[:, None], np.ones(len(running), np.int64))
            tokens = [each.step(row) for each, row in zip(running, logits, strict=True)]


def _next(waiting: list[int], prompts: Sequence[Sequence[int]], room: int) -> list[int]:
    """Take the prompts that join next off the end of ``waiting``."""
    taken: list[int] = []
    while waiting and len(taken) < room:
        longest = len(prompts[taken[0] if taken else waiting[-1]])
        if taken and longest * (len(taken) + 1) > PREFILL_TOKENS:
            break
        taken.append(waiting.pop())
    return taken


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """(B, S) ids padded behind, and (B,) how many are real."""
    counts = np.array([len(prompt) for prompt in prompts], np.int64)
    ids = np.zeros((len(prompts), int(counts.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, counts


def _compact(stays: Sequence[bool]) -> list[int]:
    """The rows that stay, in an order in which few of them move: the last ones fill the gaps."""
    rows = [row for row, kept in enumerate(stays) if kept]
    tail = [row for row in rows if row >= len(rows)]
    return [row if stays[row] else tail.pop() for row in range(len(rows))]
