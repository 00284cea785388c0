"""The scheduler: one thread that owns a backend and steps; requests come from any other thread.

Continuous batching as in Orca (Yu et al., 2022), prompts in pieces between the others' tokens as in Sarathi (Agrawal
et al., 2023). It knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from flabc.errors import ClosedError, DeadlineError, EngineError, FlabcError, QueueFullError

from .batch import Batch, Job, caused
from .prefixes import PrefixCache
from .sampling import Token, scored
from .session import Session

LOG = logging.getLogger("flabc.scheduler")

#: Weight of the latest job in the running mean of how long a job takes.
LATEST = 0.1


@dataclass(frozen=True)
class Policy:
    """What a scheduler allows itself.

    Args:
        max_queue: jobs that may wait for room, beside those that run.
        prefill_tokens: prompt tokens that a step computes at most: what those that run wait for.
        prefix_bytes: what keys and values of earlier sequences may take, for prompts that begin alike; 0 for none.
        timeout_s: seconds that a job may take, waiting included; None for any.
    """

    max_queue: int = 64
    prefill_tokens: int = 256
    prefix_bytes: int = 256 * 2**20
    timeout_s: float | None = None


@dataclass(frozen=True)
class Load:
    """How busy a scheduler is.

    Args:
        running: what has a place in the batch, be it that it enters at the next step.
        waiting: what waits for one.
        cache: the share of all places for keys and values that are in use.
    """

    running: int
    waiting: int
    cache: float


@dataclass(frozen=True)
class _Text:
    """A sequence to score."""

    ids: Sequence[int]
    top: int
    future: Future[list[Token]] = field(default_factory=Future)
    made: float = field(default_factory=time.monotonic)


class Scheduler:
    """Answers jobs on a session, as many at once as its ``max_batch`` allows, first come first served.

    Args:
        session: an opened engine, of which nobody else may make use meanwhile.
        policy: how much may wait, and for how long.
        ended: told of every job that ended, in the scheduler's thread.
    """

    def __init__(
        self, session: Session, policy: Policy | None = None, ended: Callable[[Job], None] = lambda job: None
    ) -> None:
        self.session, self.policy = session, policy or Policy()
        self.steps = 0
        self._ended = ended
        prefixes = PrefixCache(self.policy.prefix_bytes) if self.policy.prefix_bytes else None
        self._batch = Batch(session.backend, self.policy.prefill_tokens, prefixes)
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._texts: deque[_Text] = deque()
        self._live = 0  # accepted and not ended
        self._accepting, self._closed = True, False
        self._job_s = 1.0
        self._thread = threading.Thread(target=self._run, name="flabc-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(
        self, jobs: Sequence[Job], to_score: Sequence[tuple[Sequence[int], int]] = ()
    ) -> list[Future[list[Token]]]:
        """Accept jobs and sequences to score, all of them or none.

        Args:
            jobs: what is to be answered.
            to_score: token ids, and how many of the most likely ones are wanted in the place of each.

        Returns:
            of each sequence the log-probabilities of its tokens but the first.

        Raises:
            ClosedError: if no more are accepted.
            QueueFullError: if too many wait.
        """
        texts = [_Text(ids, top) for ids, top in to_score]
        with self._changed:
            self.check(len(jobs) + len(texts))
            self._live += len(jobs) + len(texts)
            self._arrived.extend(jobs)
            self._texts.extend(texts)
            self._changed.notify_all()
        return [text.future for text in texts]

    def load(self) -> Load:
        """How busy it is at this moment."""
        limits = self.session.backend.limits
        used = sum(job.length for job in self._batch.rows) / (limits.max_batch * limits.max_length)
        live = self._live
        running = min(live, limits.max_batch)
        return Load(running, live - running, used)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def accepting(self) -> bool:
        """Whether jobs are accepted."""
        return self._accepting and self.alive

    def drain(self, timeout_s: float | None = None) -> bool:
        """Accept no more; wait until those accepted have ended. Whether they did in time."""
        with self._changed:
            self._accepting = False
            return self._changed.wait_for(lambda: not self._live, timeout_s)

    def close(self) -> None:
        """End at once: jobs that have not ended fail with ``ClosedError``."""
        with self._changed:
            self._accepting, self._closed = False, True
            self._changed.notify_all()
        self._thread.join()

    def check(self, count: int) -> None:
        """Refuse so many jobs and sequences to score if they would be refused now: before anything is spent on them.

        Raises:
            ClosedError: if no more are accepted.
            QueueFullError: if too many wait.
        """
        limits = self.session.backend.limits
        if not self.accepting:
            raise ClosedError("The server is shutting down.", fix="Ask another one, or this one later.")
        room = self.policy.max_queue + limits.max_batch - self._live
        if count > room:
            waits = math.ceil(self._job_s * (1 + self.policy.max_queue / limits.max_batch))
            raise QueueFullError(
                f"{self._live} requests run or wait, and there is room for {room} more.",
                retry_after_s=min(60, waits),
            )

    def _run(self) -> None:
        """Step while there is work; whatever ends this, nobody is left waiting."""
        why: FlabcError = ClosedError("The server has shut down before the answer was whole.")
        try:
            while self._wait():
                self._expire()
                self._score()
                for job in self._step():
                    self._end(job)
        except Exception as error:
            LOG.exception("the scheduler failed")
            why = caused(EngineError(f"The server can answer no more: {error}"), error)
        finally:
            self._stop(why)

    def _step(self) -> list[Job]:
        self.steps += 1
        try:
            return self._batch.step()
        except Exception as error:  # a runtime's exceptions share no root; the next requests may fare better
            LOG.exception("the engine failed")
            taken = self._batch.abandon()
            for job in taken:
                job.fail(caused(EngineError(f"The engine failed: {error}"), error))
            return taken

    def _wait(self) -> bool:
        """Wait for work and take it in; False once closed."""
        with self._changed:
            batch = self._batch
            self._changed.wait_for(lambda: self._closed or self._arrived or self._texts or batch.waiting or batch.rows)
            batch.waiting.extend(self._arrived)
            self._arrived.clear()
            return not self._closed

    def _expire(self) -> None:
        """Fail the jobs that have taken too long."""
        for job in [*self._batch.rows, *self._batch.waiting]:
            if self._late(job.marks["made"]):
                job.fail(self._too_long())

    def _late(self, made: float) -> bool:
        return self.policy.timeout_s is not None and time.monotonic() - made > self.policy.timeout_s

    def _too_long(self) -> DeadlineError:
        return DeadlineError(f"The request took longer than {self.policy.timeout_s:g} s.")

    def _score(self) -> None:
        """Score one text: those that run wait for no more than that."""
        if not self._texts:
            return
        text = self._texts.popleft()
        ids, future = text.ids, text.future
        if future.set_running_or_notify_cancel():
            try:
                if self._late(text.made):
                    raise self._too_long()
                logits = self.session.backend.score(np.array([ids[:-1]], np.int64))[0] if len(ids) > 1 else []
                future.set_result([scored(row, index, text.top) for row, index in zip(logits, ids[1:], strict=True)])
            except DeadlineError as error:
                future.set_exception(error)
            except Exception as error:
                LOG.exception("the engine failed")
                future.set_exception(caused(EngineError(f"The engine failed: {error}"), error))
        self._less(1)

    def _end(self, job: Job) -> None:
        taken = time.monotonic() - job.marks.get("started", job.marks["made"])
        self._job_s += LATEST * (taken - self._job_s)
        job.mark("ended")
        try:
            self._ended(job)
        except Exception:  # of whoever counts; the next jobs are to be answered all the same
            LOG.exception("a job was not counted")
        self._less(1)

    def _less(self, count: int) -> None:
        with self._changed:
            self._live -= count
            self._changed.notify_all()

    def _stop(self, why: FlabcError) -> None:
        """Fail whatever is left."""
        with self._changed:
            self._accepting = False
        for job in [*self._batch.drop(), *self._batch.waiting, *self._arrived]:
            job.fail(why)
            self._end(job)
        for text in self._texts:
            if text.future.set_running_or_notify_cancel():
                text.future.set_exception(why)
        self._less(len(self._texts))
