"""Loads on a session whose steps take a known time: whatever is measured can be computed by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from flabc.errors import EngineError
from flabc.runtime.backend import Ids, Limits, Logits
from flabc.runtime.measure import load, process
from flabc.runtime.measure.load import arrivals, measure_load, run_load
from flabc.runtime.measure.result import LoadPlan, LoadRun, Request, Workload
from flabc.runtime.session import Session

PROMPT, OUTPUT = 6, 4
TEXT = "def f(a, b):\n    return a * b + 1\n"

#: What a machine that is busy may add to a sleep or a hand-over, s; medians are held to it.
LATE_S = 0.004


class Metronome:
    """A backend that computes nothing: every step, of a prompt or of a token for all, takes the same time."""

    name = "metronome"

    def __init__(self, session: Session, step_s: float, max_batch: int) -> None:
        self.spec, self.step_s = session.spec, step_s
        self.limits = Limits(max_batch=max_batch, max_length=PROMPT + OUTPUT)
        self.rows = self.most = 0

    def start(self, batch: int) -> None:
        self.rows = batch

    def _step(self, ids: Ids) -> Logits:
        time.sleep(self.step_s)
        self.most = max(self.most, self.rows)
        return np.zeros((len(ids), self.spec.vocab_size), np.float32)

    def extend(self, ids: Ids, counts: Ids, first: int = 0) -> Logits:
        return self._step(ids)

    def join(self, ids: Ids, counts: Ids) -> Logits:
        self.rows += len(ids)
        return self._step(ids)

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = len(rows)


@pytest.fixture(scope="module")
def codec(tiny_engine: Path) -> Session:
    return Session.open(tiny_engine)


def beating(codec: Session, step_s: float, max_batch: int) -> tuple[Session, Metronome]:
    backend: Any = Metronome(codec, step_s, max_batch)
    return Session(backend, codec.codec), backend


def in_flight(requests: Sequence[Request]) -> int:
    """The most requests that were there at once: an answer at the very time of another's arrival comes first."""
    events = sorted([(r.asked_ms, 1) for r in requests] + [(r.done_ms, -1) for r in requests])
    return int(np.cumsum([change for _, change in events]).max())


def test_arrivals_are_a_poisson_process() -> None:
    times = arrivals(rate=5.0, count=5000, seed=3)
    gaps = np.diff(times, prepend=0.0)
    assert stats.kstest(gaps, stats.expon(scale=1 / 5).cdf).pvalue > 0.01
    assert abs(gaps.mean() - 0.2) < 3 * 0.2 / np.sqrt(5000)
    # Counts in windows of a second are Poisson's: their variance is their mean.
    counts = np.histogram(times, np.arange(0, int(times[-1])))[0]
    assert stats.chi2.interval(0.998, len(counts) - 1)[0] < (len(counts) - 1) * counts.var(ddof=1) / 5
    assert stats.chi2.interval(0.998, len(counts) - 1)[1] > (len(counts) - 1) * counts.var(ddof=1) / 5
    assert (times == arrivals(5.0, 5000, 3)).all()
    assert (times != arrivals(5.0, 5000, 4)).all()


def test_arrivals_wait_as_an_m_d_1_queue_does() -> None:
    """Pollaczek and Khinchine: one server of constant time S waits rho S / (2 (1 - rho)) on average."""
    rate, service = 4.0, 0.15
    times, free, waits = arrivals(rate, 400_000, 1), 0.0, []
    for at in times.tolist():
        waits.append(max(0.0, free - at))
        free = max(free, at) + service
    rho = rate * service
    assert np.mean(waits) == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.02)


def test_an_open_loop_is_served_as_computed_by_hand(codec: Session) -> None:
    """One place, every step 3 ms: Lindley's recursion says when each is started and done."""
    step_s, rate, count = 0.003, 60.0, 30
    session, _ = beating(codec, step_s, max_batch=1)
    run = run_load(session, [list(range(PROMPT))], OUTPUT, requests=count, arrival_rate=rate, seed=5)
    assert [r.arrived_ms for r in run.requests] == pytest.approx(1000 * arrivals(rate, count, 5))
    service, free, late = 1000 * OUTPUT * step_s, 0.0, []
    for request in run.requests:
        started = max(free, request.arrived_ms)
        free = started + service
        assert request.done_ms >= free - 0.01  # a step never takes less, and nobody overtakes
        assert request.done_ms - request.started_ms >= service - 0.01
        assert request.first_ms - request.started_ms >= 1000 * step_s - 0.01
    for before, request in pairwise(run.requests):
        late.append(request.started_ms - max(before.done_ms, request.arrived_ms))
    assert min(late) > -0.01
    assert np.median(late) < 1000 * LATE_S
    assert any(request.queue_ms > service / 2 for request in run.requests)  # some did wait


def test_latency_counts_from_the_arrival_where_the_engine_cannot_keep_up(codec: Session) -> None:
    """Ten times more than it can: the wait of the n-th grows with n, and none of that is omitted."""
    step_s, count = 0.003, 20
    session, _ = beating(codec, step_s, max_batch=1)
    rate = 10 / (OUTPUT * step_s)
    run = run_load(session, [list(range(PROMPT))], OUTPUT, requests=count, arrival_rate=rate, seed=0)
    service = 1000 * OUTPUT * step_s
    for number, (request, arrived) in enumerate(zip(run.requests, 1000 * arrivals(rate, count, 0), strict=True), 1):
        assert request.latency_ms >= number * service - arrived - 0.01
    assert np.polyfit(range(count), [r.latency_ms for r in run.requests], 1)[0] > 0.8 * service


def test_a_stall_is_counted_for_all_whom_it_keeps_waiting(codec: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself is held up once: those who came meanwhile were late by the rest of it."""
    session, _ = beating(codec, 0.0005, max_batch=4)
    true, held = load.Line.ask, []

    def ask(self: load.Line, arrived_s: float | None = None) -> None:
        if not held:
            held.append(time.sleep(0.2))
        true(self, arrived_s)

    monkeypatch.setattr(load.Line, "ask", ask)
    run = run_load(session, [list(range(PROMPT))], OUTPUT, requests=40, arrival_rate=100.0, seed=2)
    stalled = arrivals(100.0, 40, 2)[0] + 0.2
    kept = [r for r in run.requests if r.arrived_ms < 1000 * stalled]
    assert len(kept) > 10
    assert all(r.latency_ms >= 1000 * stalled - r.arrived_ms for r in kept)


@pytest.mark.parametrize(("clients", "max_batch"), [(1, 4), (3, 4), (6, 2)])
def test_a_closed_loop_keeps_its_clients_busy_and_no_more(codec: Session, clients: int, max_batch: int) -> None:
    session, backend = beating(codec, 0.002, max_batch)
    run = run_load(session, [list(range(PROMPT))], OUTPUT, requests=20, concurrency=clients)
    assert in_flight(run.requests) == clients
    assert backend.most == min(clients, max_batch)
    assert run.warmup_requests == clients
    assert len(run.counted) == -(-20 // clients) * clients
    assert all(r.arrived_ms <= r.asked_ms <= r.started_ms <= r.first_ms <= r.done_ms for r in run.requests)
    # Little's law: those there = those answered per ms x how long each is there.
    latency = np.mean([r.latency_ms for r in run.counted])
    assert len(run.counted) / run.window_ms * latency == pytest.approx(clients, rel=0.15)


def test_one_client_takes_the_time_of_its_steps(codec: Session) -> None:
    session, _ = beating(codec, 0.004, max_batch=1)
    run = run_load(session, [list(range(PROMPT))], OUTPUT, requests=8, concurrency=1)
    latencies = [r.latency_ms for r in run.counted]
    assert min(latencies) >= 4 * OUTPUT
    assert np.median(latencies) < 4 * OUTPUT + 1000 * OUTPUT * LATE_S
    assert all(b.arrived_ms >= a.done_ms for a, b in pairwise(run.requests))


def test_littles_law_holds_of_an_engine_in_an_open_loop(tiny_engine: Path) -> None:
    """The integral of those there over time, sampled on a grid, against throughput times mean latency."""
    session = Session.open(tiny_engine, limits=Limits(max_batch=3, max_length=PROMPT + OUTPUT))
    prompt = session.codec.encode_plain(TEXT)[:PROMPT]
    run = run_load(session, [prompt], OUTPUT, requests=40, arrival_rate=150.0, seed=1)
    grid = np.linspace(run.began_ms, run.requests[-1].done_ms, 20_001)
    there = sum(((r.arrived_ms <= grid) & (grid < r.done_ms)).astype(float) for r in run.requests)
    expected = len(run.counted) / run.window_ms * np.mean([r.latency_ms for r in run.counted])
    assert float(np.mean(there)) == pytest.approx(expected, rel=0.01)


def test_an_answer_cut_short_is_refused(codec: Session) -> None:
    session, _ = beating(codec, 0.0, max_batch=1)
    with pytest.raises(EngineError, match=rf"too few tokens.*Expected: {OUTPUT + 1}.*Found: {OUTPUT}"):
        run_load(session, [list(range(PROMPT))], OUTPUT + 1, requests=2, concurrency=1)


def test_a_request_that_fails_ends_the_run_with_its_reason(codec: Session) -> None:
    session, backend = beating(codec, 0.0, max_batch=1)
    backend.join = lambda *_: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(EngineError, match="division by zero"):
        run_load(session, [list(range(PROMPT))], OUTPUT, requests=2, concurrency=1)


def test_both_sides_meet_the_same_loads_in_turns(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, Any, int]] = []
    true = process.Process.call

    def call(self: process.Process, name: str, **arguments: Any) -> dict[str, Any]:
        if name == "load":
            order.append((self.folder.name, arguments.get("concurrency"), arguments["seed"]))
        return true(self, name, **arguments)

    monkeypatch.setattr(process.Process, "call", call)
    work = Workload(prompt_tokens=PROMPT, output_tokens=OUTPUT)
    plan = LoadPlan(concurrency=(2,), arrival_rate=(200.0,), requests=5, max_batch=3)
    result = measure_load(tiny_engine, tiny_dense_engine, work, plan, [TEXT])
    a, b = tiny_dense_engine.name, tiny_engine.name
    assert order == [(side, n, seed) for n in (2, None) for side, seed in ((a, 0), (b, 0), (b, 1), (a, 1))]
    closed, opened = result.cells
    assert (closed.concurrency, closed.arrival_rate) == (2, None)
    assert (opened.concurrency, opened.arrival_rate) == (None, 200.0)
    assert [len(run.counted) for run in (*closed.baseline, *closed.candidate)] == [6] * 4
    came = [[r.arrived_ms for r in by_arrival(run)] for run in (*opened.baseline, *opened.candidate)]
    assert came[0] == pytest.approx(came[2])
    assert came[1] == pytest.approx(came[3])
    assert came[0] != pytest.approx(came[1])
    assert closed.foreign_cores >= 0


def by_arrival(run: LoadRun) -> list[Request]:
    return sorted(run.requests, key=lambda request: request.arrived_ms)
