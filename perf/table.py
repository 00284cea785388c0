"""A benchmark as rows: what each side measured, their ratio, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import floor, log10
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, Literal

from flabc.runtime.measure.result import BenchResult, Cell, Sample, Side

from .estimates import median, ratio_over_openings

if TYPE_CHECKING:
    from rich.table import Table

Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "even"]

#: A change below this share counts as none, however sure the samples are of it.
EVEN = 0.005

JOULES_PER_KWH = 3_600_000

TIMES, DASH = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
STYLES: dict[Verdict, str] = {"better": "green", "worse": "red", "even": "default"}


@dataclass(frozen=True)
class Row:
    """One metric of both sides.

    Args:
        key: its name for programs, unit included.
        label: its name for people.
        unit: of ``dense`` and ``pruned``; empty for a bare number.
        dense: the baseline's value.
        pruned: the candidate's value.
        ratio: ``pruned / dense``.
        interval: 95 % confidence interval of the ratio; None where the metric is not sampled.
        better: which direction is the good one.
    """

    key: str
    label: str
    unit: str
    dense: float
    pruned: float
    ratio: float
    interval: tuple[float, float] | None
    better: Better

    @property
    def verdict(self) -> Verdict:
        """Whether the candidate gained; ``even`` if the change is tiny or its interval holds 1."""
        low, high = self.interval or (self.ratio, self.ratio)
        if abs(self.ratio - 1) < EVEN or low <= 1 <= high:
            return "even"
        return "better" if (self.ratio < 1) == (self.better == "lower") else "worse"


def rows(result: BenchResult) -> list[Row]:
    """Every metric that both sides have, in the order in which a reader asks for them."""
    dense, pruned = result.baseline, result.candidate
    return [
        *_sizes(dense, pruned),
        *_times(dense, pruned),
        *_limits(result),
        *_memory(dense, pruned),
        *_energy(result),
        *_quality(dense, pruned),
        *_cache(dense, pruned),
    ]


def cells(result: BenchResult) -> list[Cell]:
    """What was measured in full, and the sweep behind it."""
    work, sides = result.workload, (result.baseline, result.candidate)
    first = Cell(
        prompt_tokens=work.prompt_tokens,
        batch=work.batch,
        baseline=sides[0].samples,
        candidate=sides[1].samples,
    )
    return [first, *result.sweep]


def as_dict(table: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The rows by key, for ``--json``; each also says its verdict."""
    return {row.key: {**asdict(row), "verdict": row.verdict} for row in table}


def as_markdown(table: Sequence[Row]) -> str:
    """A table in GitHub's Markdown, newline at the end."""
    lines = ["| metric | dense | pruned | ratio |", "| :--- | ---: | ---: | ---: |"]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in table]
    return "\n".join(lines) + "\n"


def as_rich(table: Sequence[Row]) -> Table:
    """A table for the terminal; the ratio is green where the candidate gained and red where it lost."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("metric")
    for name in ("dense", "pruned", "ratio"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table:
        *values, ratio = _cells(row)
        shown.add_row(*values, Text(ratio, STYLES[row.verdict]))
    return shown


def quantity(value: float, unit: str) -> str:
    """A value for people: ``134.5 M``, ``538 MB``, ``21.3 ms``."""
    if unit == "parameters":
        return scaled(value, 4)
    if unit == "bytes":
        return f"{scaled(value, 3, giga='G')}B" if value >= 1e3 else f"{value:.0f} B"
    return f"{significant(value, 3)} {unit}" if unit else significant(value, 4)


def scaled(value: float, digits: int, giga: str = "B") -> str:
    """A value with a decimal prefix: ``134.5 M``, and ``6.738 B`` as parameters are counted."""
    rounded = float(f"{value:.{digits - 1}e}")  # before choosing, or 999,999 becomes "1000 k"
    for factor, prefix in ((1e9, giga), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= factor:
            return f"{significant(rounded / factor, digits)} {prefix}"
    return significant(rounded, digits)


def significant(value: float, digits: int) -> str:
    """A value with that many significant digits; digits before the point are never cut."""
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = floor(log10(abs(rounded))) if rounded else 0
    decimals = max(0, digits - 1 - exponent)
    return f"{value if decimals == 0 else rounded:,.{decimals}f}"


def times(ratio: float) -> str:
    """A ratio for people, ``0.78×``; near 1 and near 0 it keeps a third decimal."""
    fine = 0 < abs(ratio - 1) < 0.01 or ratio < 0.1
    return f"{ratio:.3f}{TIMES}" if fine else f"{ratio:.2f}{TIMES}"


def times_with_interval(row: Row) -> str:
    """``0.78×``, or ``0.78× (0.75–0.81)`` where there is an interval."""
    return times(row.ratio) if row.interval is None else f"{times(row.ratio)} ({interval_text(row.interval)})"


def interval_text(interval: tuple[float, float]) -> str:
    """``0.75–0.81``, with the decimals that tell its ends apart."""
    low, high = interval
    decimals = 2 if high - low >= 0.02 else 3
    return f"{low:.{decimals}f}{DASH}{high:.{decimals}f}"


def ratio_of(
    metric: Callable[[Sample], float], above: Sequence[Sample], below: Sequence[Sample]
) -> tuple[float, tuple[float, float]]:
    """How many times the metric of ``below`` that of ``above`` is, and the interval, over their openings.

    Raises:
        ValueError: if one has an opening that the other lacks.
    """
    sides = [_by_opening(metric, samples) for samples in (above, below)]
    if sides[0].keys() != sides[1].keys():
        raise ValueError(f"openings {[*sides[0]]} and {[*sides[1]]} are not the same")
    return ratio_over_openings(*([side[number] for number in sorted(side)] for side in sides))


def middle_of(metric: Callable[[Sample], float], samples: Sequence[Sample]) -> float:
    """The median of an opening; of several the geometric mean of their medians, whose ratios are those of ``ratio_of``.

    Raises:
        ValueError: if there are no samples.
    """
    middles = [median(values) for values in _by_opening(metric, samples).values()]
    return middles[0] if len(middles) == 1 else geometric_mean(middles)


def _by_opening(metric: Callable[[Sample], float], samples: Sequence[Sample]) -> dict[int, list[float]]:
    openings: dict[int, list[float]] = {}
    for sample in samples:
        openings.setdefault(sample.opening, []).append(metric(sample))
    return openings


def _cells(row: Row) -> tuple[str, str, str, str]:
    return row.label, quantity(row.dense, row.unit), quantity(row.pruned, row.unit), times_with_interval(row)


def _sizes(dense: Side, pruned: Side) -> Iterator[Row]:
    counts = dense.spec.num_parameters, pruned.spec.num_parameters
    yield _row("parameters", "parameters", "parameters", *counts)
    yield _row("bytes_on_disk", "size on disk", "bytes", dense.bytes_on_disk, pruned.bytes_on_disk)


def _times(dense: Side, pruned: Side) -> Iterator[Row]:
    sides = dense.samples, pruned.samples
    if not all(sides):
        return
    yield _timed("ttft_ms", "time to first token", "ms", lambda sample: sample.ttft_ms, *sides)
    if all(sample.token_ms for side in sides for sample in side):  # one output token has no time per token
        yield _timed("tpot_ms", "time per output token", "ms", lambda sample: sample.tpot_ms, *sides)
    yield _timed(
        "tokens_per_s",
        "tokens per second",
        "tok/s",
        lambda sample: sample.tokens_per_s,
        *sides,
        better="higher",
    )


def _limits(result: BenchResult) -> Iterator[Row]:
    """How near each phase comes to what the machine can do: a token reads all weights, a prompt multiplies them."""
    roof, work, sides = result.roofline, result.workload, (result.baseline, result.candidate)
    if roof is None or not all(side.samples and side.bytes_per_token for side in sides):
        return
    dense, pruned = (_bandwidth_share(side, roof.bandwidth_gib_s) for side in sides)
    yield _row("decode_bandwidth", "decode, of memory bandwidth", "%", dense, pruned, "higher")
    dense, pruned = (_arithmetic_share(side, roof.gflops, work.batch * work.prompt_tokens) for side in sides)
    yield _row("prefill_arithmetic", "prefill, of float32 arithmetic", "%", dense, pruned, "higher")


def _bandwidth_share(side: Side, bandwidth_gib_s: float) -> float:
    least_ms = 1000 * (side.bytes_per_token or 0) / 2**30 / bandwidth_gib_s
    return 100 * least_ms / middle_of(lambda sample: sample.tpot_ms, side.samples)


def _arithmetic_share(side: Side, gflops: float, prompt_tokens: int) -> float:
    least_ms = side.spec.flops_per_token() * prompt_tokens / gflops / 1e6
    return 100 * least_ms / middle_of(lambda sample: sample.ttft_ms, side.samples)


def conversion(result: BenchResult) -> float | None:
    """How much of the bytes saved became time saved: the decode's speed-up over the ratio of bytes read."""
    dense, pruned = result.baseline, result.candidate
    if not (dense.samples and pruned.samples and dense.bytes_per_token and pruned.bytes_per_token):
        return None
    speed_up, _ = ratio_of(lambda sample: sample.tpot_ms, dense.samples, pruned.samples)
    return speed_up / (dense.bytes_per_token / pruned.bytes_per_token)


def _memory(dense: Side, pruned: Side) -> Iterator[Row]:
    label = "peak memory of the host" if dense.on_gpu or pruned.on_gpu else "peak memory"
    yield _row("peak_memory_mib", label, "MiB", dense.peak_rss_mib, pruned.peak_rss_mib)


def _energy(result: BenchResult) -> Iterator[Row]:
    """What was read of counters; CO2 only from that, and from what was said of the grid."""
    dense, pruned = result.baseline, result.candidate
    joules = [side.energy.joules_per_token if side.energy else None for side in (dense, pruned)]
    if joules[0] is None or joules[1] is None:
        return
    yield _row("joules_per_token", "energy per token, above idle", "J", joules[0], joules[1])
    if grid := result.grid_g_per_kwh:
        name, mg_per_joule = f"CO2 per token, estimated at {grid:g} g/kWh", 1000 * grid / JOULES_PER_KWH
        yield _row("co2_mg_per_token", name, "mg", mg_per_joule * joules[0], mg_per_joule * joules[1])


def _quality(dense: Side, pruned: Side) -> Iterator[Row]:
    if dense.perplexity is None or pruned.perplexity is None:
        return
    # One token count for both: a pruned vocabulary cuts the same text into other tokens.
    tokens = dense.perplexity.tokens
    both = dense.perplexity.per(tokens), pruned.perplexity.per(tokens)
    yield _row("perplexity", "perplexity (per dense token)", "", *both)
    bits = dense.perplexity.bits_per_byte, pruned.perplexity.bits_per_byte
    yield _row("bits_per_byte", "bits per byte", "", *bits)


def _cache(dense: Side, pruned: Side) -> Iterator[Row]:
    both = dense.spec.kv_bytes_per_token(), pruned.spec.kv_bytes_per_token()
    if both[0]:  # a model without attention has no cache to compare with
        yield _row("kv_bytes_per_token", "KV cache per token (float32)", "bytes", *both)


def _row(key: str, label: str, unit: str, dense: float, pruned: float, better: Better = "lower") -> Row:
    return Row(key, label, unit, dense, pruned, pruned / dense, interval=None, better=better)


def _timed(
    key: str,
    label: str,
    unit: str,
    metric: Callable[[Sample], float],
    dense: Sequence[Sample],
    pruned: Sequence[Sample],
    better: Better = "lower",
) -> Row:
    before, after = (middle_of(metric, side) for side in (dense, pruned))
    ratio, interval = ratio_of(metric, pruned, dense)
    return Row(key, label, unit, before, after, ratio, interval, better)
