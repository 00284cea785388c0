from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from pydantic import ValidationError

from flabc.errors import EngineError
from flabc.runtime.measure import bench, process
from flabc.runtime.measure.result import Energy, Sample, Workload
from flabc.runtime.measure.worker import Worker
from flabc.runtime.sampling import SamplingParams

SMALL = Workload(prompt_tokens=8, output_tokens=4, rounds=1)
TEXT = "def f(a, b):\n    return a * b + 1\n"


def test_a_sample_derives_its_figures() -> None:
    sample = Sample(ttft_ms=100, token_ms=(10, 20, 30))
    assert (sample.total_ms, sample.tpot_ms) == (160, 20)
    assert sample.tokens_per_s == pytest.approx(4 / 0.160)


def test_runs_are_interleaved_so_that_drift_cancels(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    true = process.Process.run

    def run(self: process.Process, text: str, workload: Workload) -> Sample:
        order.append(self.folder.name)
        return true(self, text, workload)

    monkeypatch.setattr(process.Process, "run", run)
    monkeypatch.setattr(bench, "warm_up", lambda *_: 0)
    result = bench.bench(tiny_engine, tiny_dense_engine, SMALL.model_copy(update={"rounds": 2}), [TEXT], [])
    a, b = tiny_dense_engine.name, tiny_engine.name
    assert order == [a, b, b, a] * 2
    assert result.baseline.perplexity is None
    assert result.baseline.peak_rss_mib > 20


def test_both_are_opened_several_times_and_neither_is_always_first(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, int]] = []
    true = process.Process.__init__

    def begin(self: process.Process, folder: Path, *workloads: Workload) -> None:
        true(self, folder, *workloads)
        begun.append((folder.name, self.pid))

    monkeypatch.setattr(process.Process, "__init__", begin)
    wide = SMALL.model_copy(update={"batch": 2})
    result = bench.bench(tiny_engine, tiny_dense_engine, SMALL, [TEXT], [TEXT], [wide], openings=3)
    a, b = tiny_dense_engine.name, tiny_engine.name
    assert [name for name, _ in begun] == [a, b, b, a, a, b]
    assert len({pid for _, pid in begun}) == 6
    for samples in (
        *(side.samples for side in (result.baseline, result.candidate)),
        *(getattr(cell, side) for cell in result.sweep for side in ("baseline", "candidate")),
    ):
        assert [sample.opening for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert (result.openings, len(result.foreign_cores)) == (3, 3)
    assert result.baseline.perplexity is not None


def test_a_budget_ends_openings_before_one_that_would_not_fit(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]

    def warm_up(*_: object) -> int:
        now[0] += 5  # of each side, so that an opening takes ten seconds
        return 1

    def energy(*_: object) -> Energy:
        now[0] += 3  # of each side, once
        return Energy(missing="not asked")

    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(bench, "warm_up", warm_up)
    monkeypatch.setattr(bench, "_energy", energy)
    for budget_s, most, expected in ((36, None, 3), (35.9, None, 2), (36, 2, 2), (1, None, 1)):
        now[0] = 0
        result = bench.bench(tiny_engine, tiny_dense_engine, SMALL, [TEXT], [], openings=most, budget_s=budget_s)
        assert result.openings == expected
        assert result.candidate.energy == Energy(missing="not asked")


def test_a_sweep_measures_every_cell_in_turns(
    tiny_engine: Path, tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int, int]] = []
    true = process.Process.run

    def run(self: process.Process, text: str, workload: Workload) -> Sample:
        order.append((self.folder.name, workload.prompt_tokens, workload.batch))
        return true(self, text, workload)

    monkeypatch.setattr(process.Process, "run", run)
    monkeypatch.setattr(bench, "warm_up", lambda *_: 0)
    wide = SMALL.model_copy(update={"batch": 3, "prompt_tokens": 6})
    result = bench.bench(tiny_engine, tiny_dense_engine, SMALL, [TEXT], [], [wide])
    a, b = tiny_dense_engine.name, tiny_engine.name
    assert order == [(side, *cell) for cell in ((8, 1), (6, 3)) for side in (a, b, b, a)]
    (cell,) = result.sweep
    assert (cell.prompt_tokens, cell.batch, len(cell.baseline), len(cell.candidate)) == (6, 3, 2, 2)
    assert all(len(sample.token_ms) == SMALL.output_tokens - 1 for sample in (*cell.baseline, *cell.candidate))
    assert result.roofline is not None
    assert len(result.foreign_cores) == SMALL.rounds
    assert result.baseline.bytes_per_token == pytest.approx(4 * result.baseline.spec.num_parameters, rel=0.4)
    assert result.candidate.energy is not None
    assert (result.candidate.energy.joules_per_token is None) == (result.candidate.energy.missing is not None)


def test_energy_is_of_all_tokens_of_a_batch_by_the_counter_of_what_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Counter:
        name = "test"

    def find(*, on_gpu: bool) -> Counter:
        asked.append(on_gpu)
        return Counter()

    monkeypatch.setattr(bench, "find_counter", find)
    monkeypatch.setattr(bench, "measure_energy", lambda counter, work: work())
    timed: Any = Timed(1)
    timed.on_gpu = True
    assert bench._energy(timed, TEXT, SMALL.model_copy(update={"batch": 3})) == 3 * SMALL.output_tokens
    assert asked == [True]


def test_the_provider_reaches_the_worker(tiny_engine: Path) -> None:
    with pytest.raises(EngineError, match="CUDAExecutionProvider"):
        process.Process(tiny_engine, SMALL.model_copy(update={"provider": "cuda"}))


def test_a_batch_makes_the_tokens_that_each_row_would_alone(tiny_engine: Path) -> None:
    worker = Worker(str(tiny_engine), max_length=12, max_batch=3, threads=None, provider="auto")
    ids = worker.session.codec.encode_plain(TEXT)[:8]
    together = np.concatenate([np.asarray(step) for step in worker._steps(ids, 4, 3)], axis=1)
    alone = [token.id for token in worker.session.tokens(ids, SamplingParams(max_tokens=4, ignore_eos=True))]
    assert together.tolist() == [alone] * 3


def test_a_worker_that_dies_is_told_with_its_exit_code(tiny_engine: Path) -> None:
    worker = process.Process(tiny_engine, SMALL)
    worker._pipe.kill()
    with pytest.raises(EngineError, match="exit code -9"):
        worker.run(TEXT, SMALL)
    worker.close()


def test_peak_memory_is_the_workers_own_and_not_what_began_it(tiny_engine: Path) -> None:
    held = np.ones(512 * 2**20, np.uint8)
    worker = process.Process(tiny_engine, SMALL)
    worker.run(TEXT, SMALL)
    own = psutil.Process(worker.pid).memory_info().rss / 2**20
    peak = worker.call("memory")["peak_rss_mib"]
    worker.close()
    assert held.nbytes == 512 * 2**20
    assert own <= peak < own + 200


def test_a_text_too_short_for_the_prompt_is_refused(tiny_engine: Path) -> None:
    worker = process.Process(tiny_engine, SMALL)
    with pytest.raises(EngineError, match="8 tokens"):
        worker.run("a", SMALL)
    worker.close()


def test_an_engine_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is no model"):
        process.Process(tmp_path, SMALL)


class Timed:
    """A process whose runs take as long as it is told."""

    def __init__(self, *totals_ms: float) -> None:
        self.totals_ms = list(totals_ms)

    def run(self, text: str, workload: Workload) -> Sample:
        return Sample(ttft_ms=self.totals_ms.pop(0), token_ms=(0,))


@pytest.mark.parametrize(
    ("totals_ms", "runs"),
    [
        ((100, 101), 2),
        ((200, 100, 109), 3),
        ((100, 200, 100, 200, 100, 200, 100), process.MAX_WARMUPS),  # never steady
    ],
)
def test_warming_up_ends_when_runs_are_steady_or_at_the_bound(totals_ms: tuple[float, ...], runs: int) -> None:
    timed: Any = Timed(*totals_ms)
    assert process.warm_up(timed, TEXT, SMALL) == runs
    assert len(timed.totals_ms) == len(totals_ms) - runs


def test_a_run_cut_short_by_the_model_is_refused(tiny_engine: Path) -> None:
    worker = process.Process(tiny_engine, SMALL)
    with pytest.raises(EngineError, match=r"too few tokens.*Expected: 5.*Found: 4"):
        worker.run(TEXT, SMALL.model_copy(update={"output_tokens": 5}))
    worker.close()


@pytest.mark.parametrize("wrong", [{"output_tokens": 1}, {"rounds": 0}, {"prompt_tokens": 0}, {"threads": 0}])
def test_a_workload_that_measures_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        Workload.model_validate(wrong)
