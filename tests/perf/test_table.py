# ruff: noqa: RUF001 - the report writes real multiplication signs and dashes
from __future__ import annotations

import json
from math import exp, log
from typing import Any

import pytest
from rich.console import Console

from flabc.perf.table import (
    Row,
    as_dict,
    as_markdown,
    as_rich,
    conversion,
    interval_text,
    quantity,
    ratio_of,
    rows,
    times,
)
from flabc.runtime.measure.result import BenchResult, Energy, Roofline, Sample

KEYS = [
    "parameters",
    "bytes_on_disk",
    "ttft_ms",
    "tpot_ms",
    "tokens_per_s",
    "peak_memory_mib",
    "perplexity",
    "bits_per_byte",
    "kv_bytes_per_token",
]


def changed(result: BenchResult, **fields: Any) -> BenchResult:
    """The benchmark with other values, the same on both sides."""
    sides = {name: getattr(result, name).model_copy(update=fields) for name in ("baseline", "candidate")}
    return result.model_copy(update=sides)


def row(ratio: float, interval: tuple[float, float] | None = None, better: Any = "lower") -> Row:
    return Row("key", "label", "ms", 1.0, ratio, ratio, interval, better)


def test_rows_come_in_the_readers_order(result: BenchResult) -> None:
    assert [row.key for row in rows(result)] == KEYS


def test_co2_is_estimated_only_from_energy_that_was_read(result: BenchResult) -> None:
    grid = result.model_copy(update={"grid_g_per_kwh": 360.0})
    assert not {"joules_per_token", "co2_mg_per_token"} & {row.key for row in rows(grid)}
    read = changed(grid, energy=Energy(counter="RAPL", joules_per_token=0.5, idle_w=1, window_s=2, tokens=9))
    (co2,) = (row for row in rows(read) if row.key == "co2_mg_per_token")
    assert (co2.dense, co2.pruned) == (pytest.approx(0.05), pytest.approx(0.05))  # 0.1 mg a joule
    assert "360 g/kWh" in co2.label
    assert "co2_mg_per_token" not in {row.key for row in rows(read.model_copy(update={"grid_g_per_kwh": None}))}


def limited(result: BenchResult) -> BenchResult:
    """On a machine of 10 GiB/s and 100 GFLOP/s, the pruned engine reading 3/4 of the bytes."""
    sizes = {"baseline": 2**29, "candidate": 3 * 2**27}
    sides = {name: getattr(result, name).model_copy(update={"bytes_per_token": size}) for name, size in sizes.items()}
    return result.model_copy(update={**sides, "roofline": Roofline(bandwidth_gib_s=10, gflops=100)})


def test_phases_as_shares_of_the_roofline_by_hand(result: BenchResult) -> None:
    dense = tuple(Sample(ttft_ms=500, token_ms=(100, 100)) for _ in range(3))
    pruned = tuple(Sample(ttft_ms=500, token_ms=(80, 80)) for _ in range(3))
    sides = {
        "baseline": result.baseline.model_copy(update={"samples": dense}),
        "candidate": result.candidate.model_copy(update={"samples": pruned}),
    }
    near = limited(result.model_copy(update=sides))
    table = {row.key: row for row in rows(near)}
    assert (table["decode_bandwidth"].dense, table["decode_bandwidth"].pruned) == (50, pytest.approx(46.875))
    operations = near.baseline.spec.flops_per_token() * near.workload.prompt_tokens
    assert table["prefill_arithmetic"].dense == pytest.approx(100 * operations / 100e9 / 0.5)
    assert table["decode_bandwidth"].verdict == "worse"
    assert conversion(near) == pytest.approx(1.25 / (4 / 3))


def test_without_a_roofline_there_are_no_shares_and_no_conversion_without_bytes(result: BenchResult) -> None:
    assert conversion(result) is None
    on_gpu = result.model_copy(update={"candidate": result.candidate.model_copy(update={"on_gpu": True})})
    assert "peak memory of the host" in {row.label for row in rows(on_gpu)}
    assert "decode_bandwidth" not in {row.key for row in rows(limited(result).model_copy(update={"roofline": None}))}


def test_parameters_of_smollm2_are_the_published_count(result: BenchResult) -> None:
    parameters = rows(result)[0]
    assert parameters.dense == 134_515_008
    assert quantity(parameters.dense, parameters.unit) == "134.5 M"


def test_timed_rows_by_hand(result: BenchResult) -> None:
    # TPOT 2, 4, 3 -> 3 ms; total 14, 18, 16 ms for 3 tokens
    dense = tuple(Sample(ttft_ms=10, token_ms=(a, b)) for a, b in ((1, 3), (4, 4), (2, 4)))
    pruned = tuple(Sample(ttft_ms=5, token_ms=(1.5, 1.5)) for _ in range(3))
    sides = {
        "baseline": result.baseline.model_copy(update={"samples": dense}),
        "candidate": result.candidate.model_copy(update={"samples": pruned}),
    }
    table = {row.key: row for row in rows(result.model_copy(update=sides))}
    assert (table["ttft_ms"].dense, table["ttft_ms"].pruned, table["ttft_ms"].ratio) == (10, 5, 0.5)
    assert (table["tpot_ms"].dense, table["tpot_ms"].pruned, table["tpot_ms"].ratio) == (3, 1.5, 0.5)
    assert table["tokens_per_s"].dense == pytest.approx(1000 * 3 / 16)
    assert table["tokens_per_s"].pruned == pytest.approx(1000 * 3 / 8)
    assert table["tokens_per_s"].better == "higher"
    assert table["ttft_ms"].interval == (0.5, 0.5)
    low, high = table["tpot_ms"].interval or (0, 0)
    assert 1.5 / 4 <= low <= 0.5 <= high <= 1.5 / 2


def test_the_interval_is_over_openings_where_there_are_several(result: BenchResult) -> None:
    # Of the openings one is 2 and one is 3 times as fast; within them nothing differs.
    dense = tuple(Sample(ttft_ms=12, token_ms=(12,), opening=at) for at in (0, 0, 1, 1))
    pruned = tuple(Sample(ttft_ms=ms, token_ms=(ms,), opening=at) for ms, at in ((6, 0), (6, 0), (4, 1), (4, 1)))
    sides = {
        "baseline": result.baseline.model_copy(update={"samples": dense}),
        "candidate": result.candidate.model_copy(update={"samples": pruned}),
    }
    found = result.model_copy(update=sides)
    (timed,) = (row for row in rows(found) if row.key == "tpot_ms")
    assert (timed.dense, timed.pruned) == (pytest.approx(12), pytest.approx(24**0.5))
    assert timed.ratio == pytest.approx((1 / 6) ** 0.5) == timed.pruned / timed.dense
    reach = 12.706 * log(1.5) / 2  # Student's t of one degree of freedom, and the standard error
    assert timed.interval == pytest.approx((timed.ratio / exp(reach), timed.ratio * exp(reach)), rel=1e-4)
    assert timed.verdict == "even"


def test_an_opening_is_compared_with_the_one_beside_it() -> None:
    def runs(*openings: int) -> list[Sample]:
        return [Sample(ttft_ms=at + 1, token_ms=(at + 1,), opening=at) for at in openings]

    ratio, interval = ratio_of(lambda sample: sample.ttft_ms, runs(0, 1, 2), runs(2, 0, 1))
    assert ratio == pytest.approx(1)
    assert interval == pytest.approx((1, 1))
    with pytest.raises(ValueError, match=r"openings \[0, 2\] and \[0, 1\]"):
        ratio_of(lambda sample: sample.ttft_ms, runs(0, 2), runs(0, 1))


def test_only_timed_rows_have_an_interval(result: BenchResult) -> None:
    timed = {row.key for row in rows(result) if row.interval is not None}
    assert timed == {"ttft_ms", "tpot_ms", "tokens_per_s"}


def test_perplexity_of_both_is_per_dense_token(result: BenchResult) -> None:
    table = {row.key: row for row in rows(result)}
    assert table["perplexity"].dense == pytest.approx(exp(2500 / 1000))
    assert table["perplexity"].pruned == pytest.approx(exp(2600 / 1000))  # not 2600 / 1100, its own count
    assert table["bits_per_byte"].pruned == pytest.approx(2600 / log(2) / 4000)
    assert table["perplexity"].label == "perplexity (per dense token)"


def test_cache_bytes_count_the_layers_that_have_attention(result: BenchResult) -> None:
    cache = rows(result)[-1]
    assert cache.dense == 2 * 64 * 3 * 30 * 4
    assert cache.pruned == 2 * 64 * 3 * 23 * 4  # 4 of 27 have none


def test_quality_needs_both_sides(result: BenchResult) -> None:
    blind = result.candidate.model_copy(update={"perplexity": None})
    keys = [row.key for row in rows(result.model_copy(update={"candidate": blind}))]
    assert keys == [key for key in KEYS if key not in {"perplexity", "bits_per_byte"}]


def test_what_was_not_timed_has_no_row(result: BenchResult) -> None:
    single = changed(result, samples=(Sample(ttft_ms=9, token_ms=()),) * 4)
    assert "tpot_ms" not in as_dict(rows(single))
    assert as_dict(rows(single))["tokens_per_s"]["dense"] == pytest.approx(1000 / 9)
    assert not {"ttft_ms", "tpot_ms", "tokens_per_s"} & set(as_dict(rows(changed(result, samples=()))))


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (row(0.8), "better"),
        (row(1.2), "worse"),
        (row(1.2, better="higher"), "better"),
        (row(0.8, better="higher"), "worse"),
        (row(1.004), "even"),
        (row(0.9, (0.8, 1.01)), "even"),
        (row(0.9, (0.88, 0.92)), "better"),
        (row(0.998, (0.997, 0.999)), "even"),
    ],
)
def test_verdict_needs_effect_and_certainty(given: Row, verdict: str) -> None:
    assert given.verdict == verdict


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (134_515_008, "parameters", "134.5 M"),
        (6_738_000_000, "parameters", "6.738 B"),
        (999_999, "parameters", "1.000 M"),
        (538_120_000, "bytes", "538 MB"),
        (999_999, "bytes", "1.00 MB"),
        (26_952_000_000, "bytes", "27.0 GB"),
        (512, "bytes", "512 B"),
        (21.34, "ms", "21.3 ms"),
        (9.996, "ms", "10.0 ms"),
        (1234.5, "ms", "1,234 ms"),
        (0.0123, "ms", "0.0123 ms"),
        (0, "ms", "0.00 ms"),
        (12.1825, "", "12.18"),
    ],
)
def test_quantity(value: float, unit: str, text: str) -> None:
    assert quantity(value, unit) == text


@pytest.mark.parametrize(
    ("ratio", "text"),
    [(0.7777, "0.78×"), (1.0, "1.00×"), (1.004, "1.004×"), (0.034, "0.034×"), (12, "12.00×")],
)
def test_times(ratio: float, text: str) -> None:
    assert times(ratio) == text


def test_interval_text_tells_its_ends_apart() -> None:
    assert interval_text((0.751, 0.812)) == "0.75–0.81"
    assert interval_text((0.7512, 0.7568)) == "0.751–0.757"


def test_markdown_is_one_rectangular_table(result: BenchResult) -> None:
    lines = as_markdown(rows(result)).splitlines()
    assert len(lines) == 2 + len(KEYS)
    assert {line.count("|") for line in lines} == {5}
    assert lines[0] == "| metric | dense | pruned | ratio |"
    assert lines[2] == "| parameters | 134.5 M | 98.97 M | 0.74× |"


def test_rich_table_fits_a_terminal_and_shows_every_row(result: BenchResult) -> None:
    console = Console(width=80, record=True, file=None, quiet=False, force_terminal=False)
    with console.capture() as shown:
        console.print(as_rich(rows(result)))
    text = shown.get()
    assert [column.header for column in as_rich([]).columns] == ["metric", "dense", "pruned", "ratio"]
    assert all(row.label in text for row in rows(result))
    assert "134.5 M" in text


def test_dict_is_json_and_keeps_full_precision(result: BenchResult) -> None:
    table = rows(result)
    data = json.loads(json.dumps(as_dict(table)))
    assert list(data) == KEYS
    assert data["tpot_ms"]["ratio"] == table[3].ratio
    assert data["tpot_ms"]["interval"] == list(table[3].interval or ())
    assert data["perplexity"]["verdict"] == "worse"
