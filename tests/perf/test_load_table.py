"""Figures under load from requests that were made up: no engine is run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from flabc.perf import load_table, plots, report
from flabc.perf.estimates import median_ratio_block_interval, percentile_intervals
from flabc.runtime.measure.result import BenchResult, LoadCell, LoadPlan, LoadResult, LoadRun, Request


def run(latencies_ms: list[float], every_ms: float = 100.0, warmup: int = 0) -> LoadRun:
    """Requests that come every 100 ms: a tenth of the latency in the queue, half of it until the first token."""
    requests = tuple(
        Request(
            arrived_ms=at,
            asked_ms=at,
            started_ms=at + 0.1 * latency,
            first_ms=at + 0.5 * latency,
            done_ms=at + latency,
        )
        for at, latency in zip(np.arange(len(latencies_ms)) * every_ms, latencies_ms, strict=True)
    )
    began = requests[warmup - 1].done_ms if warmup else 0.0
    return LoadRun(requests=requests, warmup_requests=warmup, began_ms=began, seed=None if warmup else 0)


@pytest.fixture
def loaded(result: BenchResult) -> BenchResult:
    """Two rates and a closed loop; the pruned side takes half as long."""
    slow, fast = [200.0] * 9 + [400.0], [100.0] * 9 + [200.0]
    sides = {"baseline": (run(slow), run(slow)), "candidate": (run(fast), run(fast)), "foreign_cores": 0.25}
    closed = {"baseline": (run(slow, warmup=2),), "candidate": (run(fast, warmup=2),), "foreign_cores": 0.5}
    cells = (
        LoadCell(concurrency=2, **closed),
        LoadCell(arrival_rate=2.0, **sides),
        LoadCell(arrival_rate=0.5, **sides),
    )
    plan = LoadPlan(concurrency=(2,), arrival_rate=(2.0, 0.5), requests=10)
    return result.model_copy(update={"load": LoadResult(plan=plan, cells=cells)})


def test_figures_by_hand(loaded: BenchResult) -> None:
    closed, _, dense, pruned, *_ = load_table.figures(loaded)
    assert (closed.concurrency, closed.requests) == (2, 8)
    # Counted from the second answer, at 300 ms, to the last, at 1300 ms.
    assert closed.requests_per_s == pytest.approx(8.0)
    assert (dense.side, pruned.side, dense.arrival_rate, dense.requests) == ("dense", "pruned", 2.0, 20)
    assert dense.requests_per_s == pytest.approx(20 / 2.6)
    assert dense.tokens_per_s == pytest.approx(dense.requests_per_s * loaded.workload.output_tokens)
    assert (dense.latency_ms["p50"], pruned.latency_ms["p50"], dense.latency_ms["p99"]) == (200, 100, 400)
    assert (dense.ttft_ms["p50"], dense.queue_ms["p50"]) == pytest.approx((100, 20))
    assert dense.times_as_fast is None
    assert pruned.times_as_fast == pytest.approx(2.0)
    assert pruned.times_as_fast_interval == pytest.approx((2.0, 2.0), abs=0.6)
    assert load_table.figures(loaded.model_copy(update={"load": None})) == []


def test_it_is_told_in_html_markdown_and_json(loaded: BenchResult, tmp_path: Path) -> None:
    report.write_html(loaded, tmp_path / "r.html")
    report.write_markdown(loaded, tmp_path / "r.md")
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for said in (page, text):
        assert "Under load" in said
        assert "2 requests/s come" in said
        assert "2 clients" in said
        assert "coordinated" not in said
        assert "latency counts from when they came" in said
    lines = text[text.index("## Under load") :].splitlines()[2:10]
    assert len({line.count("|") for line in lines}) == 1
    assert BenchResult.model_validate_json(loaded.model_dump_json()) == loaded
    assert [figure for figure in re.findall(r'<figure class="card" id="(\w+)"', page) if figure == "rate"]
    assert "Under load" not in _markdown(loaded.model_copy(update={"load": None}), tmp_path)


def _markdown(result: BenchResult, folder: Path) -> str:
    report.write_markdown(result, folder / "none.md")
    return (folder / "none.md").read_text()


def test_several_rates_are_drawn_in_their_order(loaded: BenchResult) -> None:
    (drawn,) = [plot for plot in plots.plots(loaded) if plot.name in ("rate", "clients")]
    assert drawn.name == "rate"
    assert drawn.spoken == "dense: 200 ms at 0.5, 200 ms at 2; pruned: 100 ms at 0.5, 100 ms at 2"
    assert "var(--pruned)" in plots.svg(drawn)


def test_blocks_of_independent_samples_say_what_scipy_says() -> None:
    draw = np.random.default_rng(0)
    samples = draw.lognormal(0, 0.3, 400)
    for q in (50, 90):
        found = percentile_intervals([samples.tolist()])[f"p{q}"]
        known = stats.bootstrap(
            (samples,), lambda x, axis, q=q: np.percentile(x, q, axis=axis), method="percentile", rng=draw
        ).confidence_interval
        assert found == pytest.approx(tuple(known), rel=0.05)
    low, high = median_ratio_block_interval([samples.tolist()], [(2 * samples).tolist()])
    assert low < 0.5 < high


def test_samples_that_hang_together_are_worth_fewer() -> None:
    """Of an AR(1) process with 0.9, whose mean is some four times as unsure as that of independent values."""
    draw = np.random.default_rng(1)
    noise, series = draw.normal(size=2500), [0.0]
    for each in noise:
        series.append(0.9 * series[-1] + each)
    alone = draw.permutation(series).tolist()
    wide, narrow = (np.diff(percentile_intervals([values])["p50"])[0] for values in (series, alone))
    assert wide > 2 * narrow
