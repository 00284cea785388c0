"""Whatever company a request has, and however it comes and goes, its answer is that of a session of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc import api
from flabc.errors import (
    CancelledError,
    ClosedError,
    DeadlineError,
    EngineError,
    FlabcError,
    QueueFullError,
)
from flabc.runtime.backend import Limits
from flabc.runtime.batch import Batch, Job
from flabc.runtime.prefixes import SHORTEST, PrefixCache
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.scheduler import Policy, Scheduler
from flabc.runtime.session import Chunk, Session

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x: int) -> None:\n" * 4
LIMITS = Limits(max_batch=3, max_length=160)


class Alone:
    """Two sessions on one folder: one for batches, one whose answers are given one prompt at a time."""

    def __init__(self, folder: Path) -> None:
        self.session, self._other = (Session.open(folder, limits=LIMITS) for _ in range(2))
        self.ids = self.session.codec.encode_plain(TEXT)
        self._known: dict[Any, tuple[int, ...]] = {}

    def answer(self, prompt: list[int], params: SamplingParams) -> tuple[int, ...]:
        key = (tuple(prompt), params)
        if key not in self._known:
            count = min(params.max_tokens, LIMITS.max_length - len(prompt))
            tokens = self._other.tokens(prompt, params)
            self._known[key] = tuple(next(tokens).id for _ in range(count))
        return self._known[key]


@pytest.fixture(scope="module")
def tiny_int8_engine(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of 8 bits make any difference in rounding visible."""
    out = tmp_path_factory.mktemp("int8") / "engine"
    api.export(tiny("qwen2-tied"), out, precision="int8")
    return out


@pytest.fixture(
    scope="module", params=["tiny_engine", "tiny_standard_engine", "tiny_openvino_engine", "tiny_int8_engine"]
)
def alone(request: pytest.FixtureRequest) -> Alone:
    return Alone(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def on_engine(tiny_engine: Path) -> Alone:
    return Alone(tiny_engine)


@pytest.fixture(scope="module")
def in_torch(tiny_checkpoint: Path) -> Alone:
    return Alone(tiny_checkpoint)


#: When it comes, where its prompt begins, its length, tokens wanted, a sampling seed or none, when it is cancelled.
arrivals = st.tuples(
    st.integers(0, 12),
    st.sampled_from([0, 0, 7]),
    st.integers(1, 60),
    st.integers(1, 20),
    st.none() | st.integers(0, 3),
    st.none() | st.integers(0, 15),
)


whoever = given(st.lists(arrivals, min_size=1, max_size=8), st.sampled_from([5, 16, 500]), st.booleans())


@whoever
@settings(max_examples=40)
def test_each_is_answered_as_alone_whoever_comes_and_goes(
    alone: Alone, given_jobs: list[tuple[Any, ...]], prefill_tokens: int, reuse: bool
) -> None:
    check(alone, given_jobs, prefill_tokens, reuse)


@whoever
@settings(max_examples=5)
def test_so_it_is_in_torch(
    in_torch: Alone, given_jobs: list[tuple[Any, ...]], prefill_tokens: int, reuse: bool
) -> None:
    check(in_torch, given_jobs, prefill_tokens, reuse)


def check(alone: Alone, given_jobs: list[tuple[Any, ...]], prefill_tokens: int, reuse: bool) -> None:
    batch = Batch(alone.session.backend, prefill_tokens, PrefixCache(2**20) if reuse else None)
    jobs = []
    for _, begin, length, wanted, seed, _ in given_jobs:
        drawn = {} if seed is None else {"temperature": 0.9, "seed": seed, "top_k": 50}
        params = SamplingParams(max_tokens=wanted, ignore_eos=True, **drawn)
        jobs.append(Job(alone.session, alone.ids[begin : begin + length], params))
    ended: list[Job] = []
    for step in range(600):
        for job, (comes, *_, leaves) in zip(jobs, given_jobs, strict=True):
            if comes == step:
                batch.waiting.append(job)
            if leaves == step and leaves > comes:
                job.cancel()
        ended += batch.step()
        assert len(batch.rows) <= LIMITS.max_batch
        if len(ended) == len(jobs):
            break
    assert set(ended) == set(jobs)
    for job in jobs:
        said = job.answer.generation().token_ids
        assert said == alone.answer(job.prompt_ids, job.params)[: len(said)]
        assert (job.error is not None) or len(said) == job.params.max_tokens


def test_no_single_token_of_a_prompt_is_left(on_engine: Alone) -> None:
    for length in (2, 11, 12, 21, 22, 31):
        computed: list[int] = []
        batch = Batch(counting(on_engine.session.backend, computed), prefill_tokens=10)
        batch.waiting.append(Job(on_engine.session, on_engine.ids[:length], wanting(1)))
        while batch.waiting or batch.rows:
            batch.step()
        assert sum(computed) == length
        assert all(2 <= count <= 11 for count in computed)


def test_a_long_prompt_does_not_stall_the_others(on_engine: Alone) -> None:
    session, ids = on_engine.session, on_engine.ids
    batch = Batch(session.backend, prefill_tokens=10)
    short, long = (Job(session, some, wanting(60)) for some in (ids[:4], ids[:98]))
    batch.waiting.append(short)
    batch.step()
    batch.waiting.append(long)
    for step in range(1, 11):
        before = len(short.answer.tokens)
        assert batch.step() == []
        assert len(short.answer.tokens) == before + 1
        assert long.filled == min(98, 10 * step)
    assert len(long.answer.tokens) == 2  # the prompt's, and one with the others


def test_prompts_that_begin_alike_are_computed_once(on_engine: Alone) -> None:
    session, ids = on_engine.session, on_engine.ids
    computed: list[int] = []
    batch = Batch(counting(session.backend, computed), 64, PrefixCache(2**24))
    jobs = [Job(session, [*ids[:50], *ids[n : n + 5]], wanting(4)) for n in range(3)]
    batch.waiting.extend(jobs)
    while batch.rows or batch.waiting:
        batch.step()
    assert [job.reused for job in jobs] == [0, *(50 + shared(ids, n) for n in (1, 2))]
    assert sum(computed) == 55 + sum(55 - job.reused for job in jobs[1:]) + 3 * 3  # and three tokens of each answer
    again = Job(session, [*jobs[0].prompt_ids, *jobs[0].answer.generation().token_ids, 9, 9], wanting(4))
    batch.waiting.append(again)  # the next turn of a conversation
    while batch.rows or batch.waiting:
        batch.step()
    assert again.reused == 55  # its prompt, not its answer
    for job in [*jobs, again]:
        assert job.answer.generation().token_ids == on_engine.answer(job.prompt_ids, job.params)


def test_a_steps_share_is_used_up(on_engine: Alone) -> None:
    session, ids = on_engine.session, on_engine.ids
    batch = Batch(session.backend, 64, PrefixCache(2**24))
    jobs = [Job(session, [*ids[:50], *ids[n : n + 5]], wanting(4)) for n in range(3)]
    batch.waiting.extend(jobs)
    batch.step()  # 55, and what is new of the others while it fits into 64
    assert [job.filled for job in jobs[:2]] == [55, 55]
    batch.step()
    assert batch.rows == jobs
    long, short = (Job(session, some, wanting(40)) for some in (ids[:70], ids[7:40]))
    batch = Batch(session.backend, 64)
    batch.waiting.extend([long, short])
    batch.step()
    assert (long.filled, short.filled) == (64, 0)
    batch.step()  # the rest of the one, and the whole of the other
    assert (long.filled, short.filled) == (70, 33)


def test_a_sequence_too_large_to_remember_pushes_none_out() -> None:
    cache = PrefixCache(max_bytes=1000)
    small, large = [1] * SHORTEST, [2] * 2 * SHORTEST
    cache.put(small, lambda length: {"0.key": np.zeros(10)})
    cache.put(large, lambda length: {"0.key": np.zeros(1000)})
    assert cache.find([*small, 5, 6]) is not None
    assert cache.find([*large, 5, 6]) is None
    assert cache.bytes == 80


def test_what_is_remembered_is_bounded_and_the_oldest_goes() -> None:
    cache = PrefixCache(max_bytes=2 * 8 * SHORTEST)
    rows = [[n] * SHORTEST for n in range(3)]
    saved = [{"0.key": np.full(SHORTEST, n)} for n in range(3)]
    for ids, one in zip(rows[:2], saved, strict=False):
        cache.put(ids, lambda length, one=one: one)  # type: ignore[misc]
    assert cache.find([*rows[0], 5, 6]) == (saved[0], SHORTEST)  # now the younger
    cache.put(rows[2], lambda length: saved[2])
    assert cache.bytes == cache.max_bytes
    assert cache.find([*rows[1], 5, 6]) is None
    assert cache.find([*rows[0], 5]) is None  # the last two are computed together, and what is left is too short
    cache.put([*rows[2], 7, 8], lambda length: {"0.key": np.zeros(4)})  # takes the place of its own beginning
    assert cache.find([*rows[2], 7, 9, 9]) == ({"0.key": pytest.approx(np.zeros(4))}, SHORTEST + 1)
    assert cache.bytes == 8 * SHORTEST + 32


# With a thread of its own


@pytest.fixture
def scheduler(on_engine: Alone) -> Iterator[Callable[..., Scheduler]]:
    opened: list[Scheduler] = []

    def make(**policy: Any) -> Scheduler:
        opened.append(Scheduler(on_engine.session, Policy(**policy)))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


class Heard:
    """What a job delivers, and a way to hold the scheduler's thread up."""

    def __init__(self) -> None:
        self.pieces: queue.SimpleQueue[Chunk | FlabcError] = queue.SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, piece: Chunk | FlabcError) -> None:
        self.pieces.put(piece)
        self.gate.wait(30)

    def next(self) -> Chunk | FlabcError:
        return self.pieces.get(timeout=30)

    def whole(self) -> tuple[int, ...]:
        ids: tuple[int, ...] = ()
        while True:
            piece = self.next()
            assert isinstance(piece, Chunk), piece
            ids += piece.token_ids
            if piece.finish_reason:
                return ids


def wanting(tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, **more)


def counting(backend: Any, computed: list[int]) -> Any:
    """The backend, counting the tokens that it computes."""

    class Counting:
        def __getattr__(self, name: str) -> Any:
            inner = getattr(backend, name)
            if name not in ("extend", "join"):
                return inner

            def call(ids: Any, counts: Any, **more: Any) -> Any:
                computed.append(int(counts.sum()))
                return inner(ids, counts, **more)

            return call

    return Counting()


def shared(ids: list[int], at: int) -> int:
    """How many of five tokens from ``at`` on are those from 0 on."""
    return next((n for n in range(4) if ids[n] != ids[at + n]), 4)


def test_requests_from_many_threads_are_answered_as_alone(
    on_engine: Alone, scheduler: Callable[..., Scheduler]
) -> None:
    running = scheduler(prefill_tokens=16)
    found: dict[int, tuple[int, ...]] = {}

    def ask(n: int) -> None:
        heard = Heard()
        running.submit([Job(on_engine.session, on_engine.ids[n : 20 + 3 * n], wanting(5 + n), heard)])
        found[n] = heard.whole()

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(12):
        assert found[n] == on_engine.answer(on_engine.ids[n : 20 + 3 * n], wanting(5 + n))
    assert running.drain(30)
    assert running.load().running == running.load().waiting == 0


def held(on_engine: Alone, running: Scheduler, jobs: int) -> tuple[Heard, list[Job]]:
    """A scheduler whose thread is held up at the first token of the first of some jobs."""
    heard = Heard()
    heard.gate.clear()
    made = [Job(on_engine.session, [5 + n], wanting(100), heard if n == 0 else None) for n in range(jobs)]
    running.submit(made)
    heard.next()
    return heard, made


def test_the_queue_is_bounded(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler(max_queue=2)
    heard, jobs = held(on_engine, running, 4)
    two = [Job(on_engine.session, [9], wanting(1)) for _ in range(2)]
    with pytest.raises(QueueFullError, match=r"4 requests run or wait.*room for 1 more.*Try again in \d+ s") as told:
        running.submit(two)  # both or none
    assert 1 <= told.value.retry_after_s <= 60
    with pytest.raises(QueueFullError):
        running.submit(two[:1], [(on_engine.ids[:8], 0)])  # so do an answer and a score
    running.submit(two[:1])
    with pytest.raises(QueueFullError):
        running.submit(two[1:])
    heard.gate.set()
    assert running.drain(30)
    assert all(job.answer.finish_reason == "length" for job in [*jobs, two[0]])


def test_first_come_is_first_served(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler(prefill_tokens=8)
    jobs = [Job(on_engine.session, on_engine.ids[: 1 + (37 * n) % 50], wanting(6)) for n in range(10)]
    for job in jobs:
        running.submit([job])
    assert running.drain(30)
    started = [job.marks["started"] for job in jobs]
    assert started == sorted(started)


def test_a_cancelled_request_frees_its_place_within_a_step(
    on_engine: Alone, scheduler: Callable[..., Scheduler]
) -> None:
    running = scheduler(max_queue=2)
    heard, jobs = held(on_engine, running, 4)
    at = running.steps
    jobs[1].cancel()
    late = Heard()
    late.gate.clear()
    running.submit([Job(on_engine.session, [9], wanting(1), late)])
    jobs[3].cancel()  # which only waits
    heard.gate.set()
    assert isinstance(late.next(), Chunk)
    assert running.steps == at + 1
    late.gate.set()
    assert running.drain(30)
    assert [isinstance(job.error, CancelledError) for job in jobs] == [False, True, False, True]
    assert jobs[0].answer.generation().token_ids == on_engine.answer([5], wanting(100))


def test_a_request_that_takes_too_long_is_ended(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler(timeout_s=0.2)
    heard, jobs = held(on_engine, running, 4)
    threading.Event().wait(0.3)
    heard.gate.set()
    assert running.drain(30)
    assert all(isinstance(job.error, DeadlineError) for job in jobs)
    assert "0.2 s" in str(heard.next()) or "0.2 s" in str(heard.next())


def test_draining_ends_what_was_accepted_and_accepts_no_more(
    on_engine: Alone, scheduler: Callable[..., Scheduler]
) -> None:
    running = scheduler()
    heard, jobs = held(on_engine, running, 5)
    assert not running.drain(0.01)
    with pytest.raises(ClosedError):
        running.submit([Job(on_engine.session, [9], wanting(1))])
    heard.gate.set()
    assert running.drain(30)
    assert [len(job.answer.tokens) for job in jobs] == [100] * 5


def test_closing_ends_all_at_once(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler()
    heard, jobs = held(on_engine, running, 5)
    closing = threading.Thread(target=running.close)
    closing.start()
    heard.gate.set()
    closing.join(30)
    assert all(isinstance(job.error, ClosedError) for job in jobs)


def fail_once(on_engine: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next step of the engine fail."""
    backend, extend = on_engine.session.backend, on_engine.session.backend.extend

    def fail(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(backend, "extend", extend)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(backend, "extend", fail)


def test_an_engine_that_fails_once_takes_only_those_that_ran(
    on_engine: Alone, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler()
    heard, jobs = held(on_engine, running, 4)
    fail_once(on_engine, monkeypatch)
    heard.gate.set()
    assert running.drain(30)
    assert ["out of memory" in str(job.error) for job in jobs] == [True, True, True, False]
    assert isinstance(jobs[0].error, EngineError)
    assert isinstance(jobs[0].error.__cause__, RuntimeError)
    assert jobs[3].answer.generation().token_ids == on_engine.answer([8], wanting(100))


def test_what_ended_in_a_step_that_failed_is_told(
    on_engine: Alone, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler(max_queue=2)
    heard, jobs = held(on_engine, running, 4)
    fail_once(on_engine, monkeypatch)
    jobs[1].cancel()  # the step that takes them out is the one that fails
    jobs[3].cancel()
    heard.gate.set()
    assert running.drain(10)  # or else their places would be lost for ever
    assert running.load().running == running.load().waiting == 0


def test_an_engine_that_cannot_begin_anew_ends_all_and_says_why(
    on_engine: Alone, scheduler: Callable[..., Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    running = scheduler()
    heard, jobs = held(on_engine, running, 4)

    def lost(_: int) -> None:
        raise OSError("device lost")

    fail_once(on_engine, monkeypatch)
    monkeypatch.setattr(on_engine.session.backend, "start", lost)
    heard.gate.set()
    assert running.drain(30)
    assert not running.alive
    assert ["device lost" in str(job.error) for job in jobs] == [True] * 4
    assert all(job.error is not None and isinstance(job.error.__cause__, OSError) for job in jobs)
    with pytest.raises(ClosedError):
        running.submit([Job(on_engine.session, [9], wanting(1))])


def test_a_listener_that_has_gone_ends_nobody_else(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    def gone(_: object) -> None:
        raise RuntimeError("Event loop is closed")

    running = scheduler(timeout_s=30)
    deaf = [Job(on_engine.session, [5], wanting(9), gone) for _ in range(2)]
    deaf[1].cancel()
    other = Job(on_engine.session, [6], wanting(9))
    running.submit([*deaf, other])
    assert running.drain(10)
    assert other.answer.generation().token_ids == on_engine.answer([6], wanting(9))
    assert all(job.error is not None for job in deaf)
    assert running.alive


def test_whoever_counts_may_fail(on_engine: Alone) -> None:
    def fail(job: Job) -> None:
        raise KeyError("ended")

    with Scheduler(on_engine.session, ended=fail) as running:
        for _ in range(2):
            running.submit([Job(on_engine.session, [5], wanting(3))])
        assert running.drain(10)
        assert running.alive


def test_closing_leaves_no_text_behind(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler()
    heard, _ = held(on_engine, running, 1)
    scores = running.submit([], [(on_engine.ids[:20], 0)] * 3)
    closing = threading.Thread(target=running.close)
    closing.start()
    while running.accepting:
        threading.Event().wait(0.01)
    heard.gate.set()
    closing.join(10)
    assert isinstance(scores[-1].exception(10), ClosedError)
    assert running.drain(1)


def test_a_text_that_waited_too_long_is_not_scored(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler(timeout_s=0.2)
    heard, _ = held(on_engine, running, 1)
    (score,) = running.submit([], [(on_engine.ids[:20], 0)])
    threading.Event().wait(0.3)
    heard.gate.set()
    assert isinstance(score.exception(10), DeadlineError)


def test_no_more_are_said_to_wait_than_may(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running = scheduler(max_queue=2)
    heard = Heard()
    heard.gate.clear()
    running.submit([Job(on_engine.session, [5], wanting(3), heard)])
    heard.next()  # one has a place, and two more places are free until the next step
    running.submit([Job(on_engine.session, [6], wanting(3)) for _ in range(4)])
    assert (running.load().running, running.load().waiting) == (3, 2)
    heard.gate.set()
    assert running.drain(10)
    assert (running.load().running, running.load().waiting) == (0, 0)


def test_a_text_is_scored_between_steps(on_engine: Alone, scheduler: Callable[..., Scheduler]) -> None:
    running, ids = scheduler(), on_engine.ids[:20]
    (scores,) = running.submit([], [(ids, 2)])
    tokens = scores.result(30)
    logits = on_engine.session.backend.score(np.array([ids]))[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert [token.id for token in tokens] == ids[1:]
    np.testing.assert_allclose([token.logprob for token in tokens], expected[np.arange(19), ids[1:]], atol=1e-4)
    assert [token.top[0][0] for token in tokens] == expected[:-1].argmax(-1).tolist()
    assert [score.result(30) for score in running.submit([], [(ids[:1], 0)])] == [[]]


def test_ids_that_the_model_has_not_are_refused(on_engine: Alone) -> None:
    size = on_engine.session.spec.vocab_size
    for wrong in (size, -1):
        with pytest.raises(EngineError, match=rf"token {wrong}.*from 0 to {size - 1}"):
            Job(on_engine.session, [1, wrong], wanting(1))
