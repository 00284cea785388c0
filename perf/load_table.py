"""What was measured under load as figures: latency and throughput of each side at each load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

from flabc.frozen import Frozen
from flabc.runtime.measure.result import BenchResult, LoadCell, LoadPlan, LoadRun

from .estimates import median_ratio, median_ratio_block_interval, percentile_intervals, percentiles
from .table import DASH, interval_text, significant, times

if TYPE_CHECKING:
    from rich.table import Table


class LoadFigures(Frozen):
    """One side at one load; percentiles by name, p50 to p99, and their 95 % intervals.

    Args:
        side: ``dense`` or ``pruned``.
        concurrency: clients of a closed loop, or else
        arrival_rate: requests per second of an open loop.
        requests: that were counted.
        requests_per_s: answered.
        tokens_per_s: of all answers together.
        latency_ms: from the arrival to the last token.
        latency_intervals_ms: of these percentiles.
        ttft_ms: from the arrival to the first token.
        queue_ms: from the arrival until the scheduler began with it.
        times_as_fast: the dense side's median latency over this one's; None for the dense side itself.
        times_as_fast_interval: of that.
        foreign_cores: that others kept busy meanwhile.
    """

    side: str
    concurrency: int | None
    arrival_rate: float | None
    requests: int
    requests_per_s: float
    tokens_per_s: float
    latency_ms: dict[str, float]
    latency_intervals_ms: dict[str, tuple[float, float]]
    ttft_ms: dict[str, float]
    queue_ms: dict[str, float]
    times_as_fast: float | None
    times_as_fast_interval: tuple[float, float] | None
    foreign_cores: float


def figures(result: BenchResult) -> list[LoadFigures]:
    """Both sides of every load, in the order in which they were measured."""
    cells = result.load.cells if result.load else ()
    return [each for cell in cells for each in _both(cell, result.workload.output_tokens)]


@lru_cache(maxsize=64)  # page, drawings, Markdown and command each ask for them, and resampling takes seconds
def _both(cell: LoadCell, output_tokens: int) -> tuple[LoadFigures, LoadFigures]:
    dense, pruned = _latencies(cell.baseline), _latencies(cell.candidate)
    pooled = list(chain.from_iterable(dense)), list(chain.from_iterable(pruned))
    ratio = median_ratio(*pooled), median_ratio_block_interval(dense, pruned)
    return (
        _figures("dense", cell, cell.baseline, output_tokens, (None, None)),
        _figures("pruned", cell, cell.candidate, output_tokens, ratio),
    )


def _figures(
    side: str,
    cell: LoadCell,
    runs: Sequence[LoadRun],
    output_tokens: int,
    ratio: tuple[float, tuple[float, float]] | tuple[None, None],
) -> LoadFigures:
    counted = [request for run in runs for request in run.counted]
    rate = 1000 * len(counted) / sum(run.window_ms for run in runs)
    latencies = _latencies(runs)
    return LoadFigures(
        side=side,
        concurrency=cell.concurrency,
        arrival_rate=cell.arrival_rate,
        requests=len(counted),
        requests_per_s=rate,
        tokens_per_s=rate * output_tokens,
        latency_ms=percentiles(list(chain.from_iterable(latencies))),
        latency_intervals_ms=percentile_intervals(latencies),
        ttft_ms=percentiles([request.ttft_ms for request in counted]),
        queue_ms=percentiles([request.queue_ms for request in counted]),
        times_as_fast=ratio[0],
        times_as_fast_interval=ratio[1],
        foreign_cores=cell.foreign_cores,
    )


def _latencies(runs: Sequence[LoadRun]) -> list[list[float]]:
    """Of each run, in the order in which its requests came: neighbours met the same queue."""
    return [
        [request.latency_ms for request in sorted(run.counted, key=lambda request: request.arrived_ms)] for run in runs
    ]


def rows(result: BenchResult) -> list[dict[str, str]]:
    """The figures for people: a row for each side of each load."""
    return [row(each) for each in figures(result)]


def row(each: LoadFigures) -> dict[str, str]:
    """A side of a load, for people."""
    clients = "1 client" if each.concurrency == 1 else f"{each.concurrency} clients"
    cells = {
        "load": clients if each.concurrency else f"{each.arrival_rate:g} requests/s come",
        "side": each.side,
        "requests": str(each.requests),
        "requests/s": significant(each.requests_per_s, 3),
        "tokens/s": significant(each.tokens_per_s, 3),
    }
    for name, value in each.latency_ms.items():
        low, high = (significant(end, 3) for end in each.latency_intervals_ms[name])
        cells[f"latency {name}, ms"] = f"{significant(value, 3)} ({low}{DASH}{high})"
    cells["first token p50, ms"] = significant(each.ttft_ms["p50"], 3)
    cells["queue p50, ms"] = significant(each.queue_ms["p50"], 3)
    cells["times as fast"] = ""
    if each.times_as_fast is not None and each.times_as_fast_interval is not None:
        cells["times as fast"] = f"{times(each.times_as_fast)} ({interval_text(each.times_as_fast_interval)})"
    cells["others, cores"] = f"{each.foreign_cores:.2f}"
    return cells


def note(plan: LoadPlan) -> str:
    """How the table is to be read."""
    said = (
        f"End-to-end latency over flabc's scheduler, without HTTP; {plan.max_batch} sequences run at once, the others "
        "wait, and nothing of earlier prompts is reused. In brackets: 95 % intervals by a block bootstrap; a high "
        "percentile of few requests is close to their maximum. Times as fast: dense over pruned, median latency."
    )
    if plan.concurrency:
        said += " Clients ask again as soon as they are answered; the first answer of each is not counted."
    if plan.arrival_rate:
        said += (
            " Requests that come at a rate come at random times (Poisson), and latency counts from when they came. "
            "Where fewer are answered per second than come, the queue grows for as long as is measured."
        )
    return said


def as_rich(measured: Sequence[LoadFigures]) -> Table:
    """A table for the terminal: the load, and what people ask for first."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Under load", title_justify="left")
    names = ("load", "side", "requests/s", "tokens/s", "latency p50, ms", "p95, ms", "p99, ms", "first token p50, ms")
    for name in names:
        shown.add_column(name, justify="left" if name in ("load", "side") else "right")
    for each in measured:
        cells, high = row(each), (significant(each.latency_ms[name], 3) for name in ("p95", "p99"))
        shown.add_row(*(cells[name] for name in names[:5]), *high, cells[names[7]])
    return shown
