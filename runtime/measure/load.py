"""Requests that come while others run: end-to-end latency and requests per second of an engine under load.

Over the real scheduler, without HTTP. A closed loop has so many clients, each of which asks again as soon as it is
answered; an open loop has requests that come at times of their own, drawn beforehand. There latency counts from the
time drawn, not from when the client came to ask: else a stall would be counted once and not for all whom it kept
waiting ("coordinated omission", Gil Tene, How NOT to Measure Latency, 2015). Both kinds, and how they differ:
B. Schroeder et al., Open Versus Closed: A Cautionary Tale (NSDI 2006).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flabc.console import Advance, progress
from flabc.errors import EngineError, FlabcError
from flabc.runtime.batch import Job
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.scheduler import Policy, Scheduler
from flabc.runtime.session import Chunk, Session

from .foreign import ForeignLoad
from .process import Process, opened, warm_up
from .result import LoadCell, LoadPlan, LoadResult, LoadRun, Request, Workload


def arrivals(rate: float, count: int, seed: int) -> npt.NDArray[np.float64]:
    """When requests come, in seconds from the start: (count,), with exponential gaps of mean ``1 / rate``."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


class Line:
    """Requests to a scheduler, and when each was answered; for one thread.

    Args:
        session: the engine's.
        scheduler: that runs on it.
        prompts: token ids, taken in turns.
        output_tokens: of every answer.
    """

    def __init__(
        self, session: Session, scheduler: Scheduler, prompts: Sequence[Sequence[int]], output_tokens: int
    ) -> None:
        self._session, self._scheduler, self._prompts = session, scheduler, prompts
        self._params = SamplingParams(max_tokens=output_tokens, ignore_eos=True)
        self._ended: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self._asked: list[tuple[Job, float, float]] = []
        self._began = time.monotonic()

    @property
    def now_s(self) -> float:
        """Seconds since the line began."""
        return time.monotonic() - self._began

    def ask(self, arrived_s: float | None = None) -> None:
        """Ask, for a request that came now or at a time that is past."""
        arrived_s = self.now_s if arrived_s is None else arrived_s
        number = len(self._asked)

        def deliver(chunk: Chunk | FlabcError) -> None:
            if isinstance(chunk, FlabcError) or chunk.finish_reason is not None:
                self._ended.put((number, self.now_s))

        job = Job(self._session, self._prompts[number % len(self._prompts)], self._params, deliver)
        self._asked.append((job, arrived_s, self.now_s))
        self._scheduler.submit([job])

    def answer(self) -> Request:
        """Wait for the next request that ends.

        Raises:
            EngineError: if it failed, or has fewer tokens than were asked for.
        """
        number, done_s = self._ended.get()
        job, arrived_s, asked_s = self._asked[number]
        if job.error is not None:
            raise job.error
        produced, wanted = len(job.answer.tokens), self._params.max_tokens
        if produced != wanted:  # the contract of the workload: an answer cut short must not look fast
            raise EngineError("A request produced too few tokens.", expected=str(wanted), found=str(produced))
        started_s, first_s = (job.marks[name] - self._began for name in ("started", "first"))
        arrived, asked, started, first, done = (1000 * s for s in (arrived_s, asked_s, started_s, first_s, done_s))
        return Request(arrived_ms=arrived, asked_ms=asked, started_ms=started, first_ms=first, done_ms=done)

    def cancel(self) -> None:
        """Take back what is not answered yet."""
        for job, _, _ in self._asked:
            job.cancel()


def closed_loop(line: Line, clients: int, count: int) -> LoadRun:
    """So many clients, until ``count`` answers came after the first of each; what they still wait for is taken back.

    All clients wait until the last answer, so that what is counted is the loop at work, not how it fills or empties.
    """
    for _ in range(clients):
        line.ask()
    answered = [line.answer()]
    while len(answered) < clients + count:
        line.ask()
        answered.append(line.answer())
    line.cancel()
    return LoadRun(requests=tuple(answered), warmup_requests=clients, began_ms=answered[clients - 1].done_ms)


def open_loop(line: Line, times_s: Sequence[float], seed: int) -> LoadRun:
    """A request at each of these times, ascending, then wait until all are answered; the line begins empty."""
    for arrived_s in times_s:
        time.sleep(max(0.0, arrived_s - line.now_s))
        line.ask(arrived_s)
    return LoadRun(requests=tuple(line.answer() for _ in times_s), seed=seed)


def run_load(
    session: Session,
    prompts: Sequence[Sequence[int]],
    output_tokens: int,
    *,
    requests: int,
    concurrency: int | None = None,
    arrival_rate: float | None = None,
    seed: int = 0,
) -> LoadRun:
    """One run on a scheduler of its own, which refuses nobody and reuses nothing of earlier prompts.

    Args:
        session: an opened engine, of which nobody else may make use meanwhile.
        prompts: token ids, taken in turns.
        output_tokens: of every answer; stop tokens are ignored.
        requests: to be counted; in a closed loop the next multiple of its clients.
        concurrency: clients of a closed loop; or else
        arrival_rate: requests per second of an open loop.
        seed: of the arrivals.

    Raises:
        EngineError: if a request fails or has fewer tokens than were asked for.
    """
    # A scheduler counts a request until its step is over, when its client has asked again already.
    policy = Policy(max_queue=requests + 2 * (concurrency or 0), prefix_bytes=0)
    with Scheduler(session, policy) as scheduler:
        line = Line(session, scheduler, prompts, output_tokens)
        if concurrency is not None:
            return closed_loop(line, concurrency, -(-requests // concurrency) * concurrency)
        assert arrival_rate is not None
        return open_loop(line, arrivals(arrival_rate, requests, seed).tolist(), seed)


def measure_load(
    candidate: Path, baseline: Path, workload: Workload, plan: LoadPlan, prompts: Sequence[str]
) -> LoadResult:
    """Both engines under every load of a plan, each load in turns: baseline, candidate, candidate, baseline.

    Args:
        candidate: the engine in question.
        baseline: what it is compared with.
        workload: lengths of prompts and answers, threads and provider; its batch and rounds do not matter.
        plan: the loads.
        prompts: texts long enough for a prompt each.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    full = workload.model_copy(update={"batch": plan.max_batch})
    loads: list[dict[str, Any]] = [{"concurrency": clients} for clients in plan.concurrency]
    loads += [{"arrival_rate": rate} for rate in plan.arrival_rate]
    # Processes of their own: a cache for a whole batch is none of what a single sequence's memory is measured by.
    with opened(baseline, full) as a, opened(candidate, full) as b:
        for side in (a, b):
            warm_up(side, prompts[0], full)
        with progress("measuring load", 4 * len(loads)) as advance:
            cells = [_cell(a, b, load, plan.requests, workload, prompts, advance) for load in loads]
    return LoadResult(plan=plan, cells=tuple(cells))


def _cell(
    a: Process,
    b: Process,
    load: dict[str, Any],
    requests: int,
    workload: Workload,
    prompts: Sequence[str],
    advance: Advance,
) -> LoadCell:
    asked = workload.model_dump(include={"prompt_tokens", "output_tokens"}) | load

    def run(side: Process, seed: int) -> LoadRun:
        done = LoadRun.model_validate(side.call("load", texts=list(prompts), requests=requests, seed=seed, **asked))
        advance(1)
        return done

    # ABBA; both sides meet the crowd of seed 0, then both that of seed 1.
    with ForeignLoad([a.pid, b.pid]) as foreign:
        first = run(a, 0)
        tried = run(b, 0), run(b, 1)
        last = run(a, 1)
    return LoadCell(**load, baseline=(first, last), candidate=tried, foreign_cores=round(foreign.cores, 3))
