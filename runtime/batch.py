"""Many prompts through one backend: they share every read of the weights, and join and leave the batch at every step.

``Batch`` knows neither threads nor HTTP; ``generate_batch`` and the scheduler both drive it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from flabc.errors import CancelledError, EngineError, FlabcError, UsageError

from .answer import Generation
from .backend import Backend, Ids, Logits
from .prefixes import PrefixCache, Saved, common
from .sampling import Sampler, SamplingParams
from .session import Chunk, Session

LOG = logging.getLogger("flabc.batch")

#: Prompt tokens, padding included, that are computed at once: enough to keep the cores busy, few enough that
#: activations stay small.
PREFILL_TOKENS = 2048


class Job:
    """A prompt on its way to an answer.

    Args:
        session: the engine's.
        prompt_ids: the prompt.
        params: how it is answered.
        deliver: given each piece of the answer as it comes, or the error that ends it.

    Attributes:
        marks: when it was ``made``, was ``started`` on, had its ``first`` token and ``ended``, in monotonic seconds.
        reused: prompt tokens whose keys and values were there already.
        error: why there is no whole answer.

    Raises:
        EngineError: if the prompt is empty, leaves no room for an answer, or has ids that the model has not.
    """

    def __init__(
        self,
        session: Session,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        deliver: Callable[[Chunk | FlabcError], None] | None = None,
    ) -> None:
        self.prompt_ids, self.params = list(prompt_ids), params
        check_prompt(session, prompt_ids)
        self.answer = session.answer(prompt_ids, params)
        self.error: FlabcError | None = None
        self.marks = {"made": time.monotonic()}
        self.filled = 0  # prompt tokens in the cache
        self.reused = 0
        self._draw = Sampler(params, prompt_ids)
        self._deliver = deliver

    @property
    def ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.error is not None or self.answer.finish_reason is not None

    @property
    def length(self) -> int:
        """Tokens whose keys and values are in the cache: all but the one that was drawn last."""
        return self.filled + max(0, len(self.answer.tokens) - 1)

    def mark(self, name: str) -> None:
        """Note when something happened first."""
        self.marks.setdefault(name, time.monotonic())

    def step(self, logits: Logits) -> None:
        """Draw the next token from (V,) logits, and deliver it. What goes wrong here ends this job only."""
        try:
            token = self._draw(logits)
            self.mark("first")
            chunk = Chunk(self.answer.take(token), (token,), self.answer.finish_reason)
            if self._deliver is not None:
                self._deliver(chunk)
        except Exception as error:  # a tokenizer's, or of whoever listens
            LOG.exception("an answer could not be written")
            self.fail(caused(EngineError(f"The answer could not be written: {error}"), error))

    def cancel(self) -> None:
        """End because nobody waits for the answer any more; its place is free within a step."""
        self.fail(CancelledError("The request was cancelled."))

    def fail(self, error: FlabcError) -> None:
        """End without a whole answer; safe from any thread, and of no effect on a job that has ended."""
        if self.ended:
            return
        self.error = error
        if self._deliver is not None:
            with suppress(Exception):  # whoever listened has gone, and others' jobs go on
                self._deliver(error)


class Batch:
    """The sequences that run, and those that wait for room, first come first served.

    The backend's rows are ``running``, in order, then ``filling`` if there is one: a prompt that is computed piece by
    piece while the others go on. One thread at a time may use it.

    Args:
        backend: what runs them; whatever it held is forgotten.
        prefill_tokens: prompt tokens that a step computes at most, padding included: what those that run wait for;
            at least 2, and one more where a single one would be left.
        prefixes: where prompts find what others have computed of them.
        eager: let prompts join while there is room, however long those that run wait.
    """

    def __init__(
        self, backend: Backend, prefill_tokens: int, prefixes: PrefixCache | None = None, *, eager: bool = False
    ) -> None:
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.filling: Job | None = None
        self._joining: list[Job] = []
        self._ended: list[Job] = []
        self._backend, self._prefixes = backend, prefixes
        self._prefill_tokens, self._eager = prefill_tokens, eager
        backend.start(0)

    @property
    def rows(self) -> list[Job]:
        """The job of each of the backend's rows; any thread may ask."""
        filling = self.filling
        return [*self.running, filling] if filling else list(self.running)

    def step(self) -> list[Job]:
        """Give every running sequence one more token, and as many prompt tokens as may be computed between.

        Returns:
            the jobs that ended, failed ones among them.
        """
        self._leave()
        left = self._prefill_tokens
        while left > 0 and (computed := self._prefill(left)):
            self._leave()
            left -= 0 if self._eager else computed
        if self.running:
            self._decode()
            self._leave()
        ended, self._ended = self._ended, []
        return ended

    def abandon(self) -> list[Job]:
        """Take out all that had begun, after a step that failed; those that wait go on waiting."""
        self._backend.start(0)
        return self.drop()

    def drop(self) -> list[Job]:
        """As ``abandon``, of a backend that is not used any more."""
        taken = list(dict.fromkeys([*self._ended, *self.rows, *self._joining]))
        self.running, self.filling, self._joining, self._ended = [], None, [], []
        return taken

    def _decode(self) -> None:
        tokens = np.array([[job.answer.tokens[-1].id] for job in self.running], np.int64)
        logits = self._backend.extend(tokens, np.ones(len(tokens), np.int64))
        for job, row in zip(self.running, logits, strict=True):
            job.step(row)

    def _prefill(self, left: int) -> int:
        """Compute prompt tokens, as many as are left of a step's share; how many, or 0 if none can be."""
        if self.filling is None:
            joining = self._next(left)
            if not joining:
                return 0
            if len(joining) > 1 or not self._restore(joining[0]):
                return self._join(joining)
        return self._fill(left)

    def _next(self, left: int) -> list[Job]:
        """Take those off the queue that join next, together: whole prompts, or one that is long or known in part."""
        room = self._backend.limits.max_batch - len(self.running)
        taken: list[Job] = []
        for job in islice(self.waiting, max(0, room)):
            longest = max(len(each.prompt_ids) for each in [*taken, job])
            if taken and (longest * (len(taken) + 1) > left or self._known(job, taken)):
                break
            if not taken and not self._fits(longest, left) and not self._found(job):
                break
            taken.append(job)
        for job in taken:
            self.waiting.popleft()
            job.mark("started")
        self._joining = taken
        return taken

    def _known(self, job: Job, taken: Sequence[Job]) -> bool:
        """Whether the beginning of a prompt, or of the first that was taken, is computed, or will be by those taken."""
        if self._prefixes is None:
            return False
        found = any(self._found(each) for each in (job, taken[0]))
        return found or any(common(job.prompt_ids, each.prompt_ids) for each in taken)

    def _found(self, job: Job) -> tuple[Saved, int] | None:
        return self._prefixes.find(job.prompt_ids) if self._prefixes else None

    def _restore(self, job: Job) -> bool:
        """Let a prompt join with what is known of its beginning; False if nothing is."""
        found = self._found(job)
        if found is None:
            return False
        self._backend.restore(*found)
        job.filled = job.reused = found[1]
        self.filling, self._joining = job, []
        return True

    def _join(self, jobs: Sequence[Job]) -> int:
        """Compute whole prompts at once, or the first piece of a long one; how many tokens that were."""
        ids, counts = _padded([self._piece(job) for job in jobs])
        logits = self._backend.join(ids, counts)
        self._joining = []
        if counts[0] < len(jobs[0].prompt_ids):
            (self.filling,) = jobs
            self.filling.filled = int(counts[0])
            return ids.size
        self.running += jobs
        for job, row in zip(jobs, logits, strict=True):
            self._answer(job, row)
        return ids.size

    def _fits(self, count: int, left: int) -> bool:
        """Whether so many tokens may still be computed in this step; a whole share takes a piece of any prompt."""
        return count <= left or left == self._prefill_tokens

    def _fill(self, left: int) -> int:
        """Compute the next piece of the prompt that is filling, if it fits; how many tokens that were."""
        job = self.filling
        assert job is not None
        piece = self._piece(job)
        if not self._fits(len(piece), left):
            return 0
        logits = self._backend.extend(*_padded([piece]), first=len(self.running))
        job.filled += len(piece)
        if job.filled == len(job.prompt_ids):
            self.running.append(job)
            self.filling = None
            self._answer(job, logits[0])
        return len(piece)

    def _piece(self, job: Job) -> list[int]:
        """What is computed next of a prompt, such that never a single token is left.

        ONNX Runtime attends from one token by another kernel than from several, which rounds differently, and weights
        of 8 bits make that visible. Only so is a prompt in pieces to the last bit what it is as a whole.
        """
        left = job.prompt_ids[job.filled :]
        return left if len(left) <= self._prefill_tokens + 1 else left[: self._prefill_tokens]

    def _answer(self, job: Job, logits: Logits) -> None:
        """Go on behind a prompt that is computed, from (V,) logits; others that begin alike may have its beginning.

        The answer's keys and values are not kept for others: see ``_piece``.
        """
        job.filled = len(job.prompt_ids)
        if self._prefixes is not None:
            row = self.running.index(job)
            self._prefixes.put(job.prompt_ids, lambda length: self._backend.save(row, length))
        job.step(logits)

    def _leave(self) -> None:
        """Take out the jobs that have ended; they are remembered until a step is whole."""
        rows = self.rows
        ended = [job for job in rows if job.ended]
        if ended:
            stays = compact([not job.ended for job in self.running])
            filling = self.filling if self.filling and not self.filling.ended else None
            self._backend.keep([*stays, len(self.running)] if filling else stays)
            self.running, self.filling = [self.running[row] for row in stays], filling
        gone = [job for job in self.waiting if job.ended]
        if gone:
            self.waiting = deque(job for job in self.waiting if not job.ended)
        for job in [*ended, *gone]:
            job.mark("ended")
        self._ended += [*ended, *gone]


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
    jobs = [Job(session, ids, param) for ids, param in zip(prompts, params, strict=True)]
    places = {job: place for place, job in enumerate(jobs)}
    batch = Batch(session.backend, PREFILL_TOKENS, eager=True)
    # Neighbours of like length waste little on padding; the longest first, so that the last to run are short.
    batch.waiting.extend(sorted(jobs, key=lambda job: -len(job.prompt_ids)))
    while batch.waiting or batch.rows:
        for job in batch.step():
            if job.error is not None:
                raise job.error
            yield places[job], job.answer.generation()


def caused(error: FlabcError, cause: BaseException) -> FlabcError:
    """An error that is not raised here but handed on, with what it comes from."""
    error.__cause__ = cause
    return error


def check_prompt(session: Session, prompt_ids: Sequence[int]) -> None:
    """Refuse a prompt that cannot be computed.

    Raises:
        EngineError: if it is empty, leaves no room for an answer, or has ids that the model has not.
    """
    session.room(prompt_ids)
    size = session.spec.vocab_size
    unknown = next((index for index in prompt_ids if not 0 <= index < size), None)
    if unknown is not None:
        raise EngineError(f"The prompt has token {unknown}.", expected=f"ids from 0 to {size - 1}")


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[Ids, Ids]:
    """(B, S) ids padded behind, and (B,) how many are real."""
    counts = np.array([len(prompt) for prompt in prompts], np.int64)
    ids = np.zeros((len(prompts), int(counts.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, counts


def compact(stays: Sequence[bool]) -> list[int]:
    """The rows that stay, in an order in which few of them move: the last ones fill the gaps."""
    rows = [row for row, kept in enumerate(stays) if kept]
    tail = [row for row in rows if row >= len(rows)]
    return [row if stays[row] else tail.pop() for row in range(len(rows))]
