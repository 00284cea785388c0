"""Verdicts from pairs whose times are given, and the files that CI systems read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from flabc.errors import RecipeError, UsageError
from flabc.perf import gate, gates, verdict_files
from flabc.perf.comparison import Estimate, EvalRow
from flabc.perf.gates import Gates, QualityGate
from flabc.runtime.measure.pairs import Opening, Pair
from flabc.runtime.measure.result import Sample

SPEED = Gates(speed={"tpot_ms": 0.03, "ttft_ms": 0.05}, budget_s=60)


class Clock:
    """A second passes with every look at it."""

    def __init__(self) -> None:
        self.now = count()

    def __call__(self) -> float:
        return float(next(self.now))


def openings(
    slower: float, *, foreign: float = 0.0, seed: int = 0, spread: float = 0.01, lucky: float = 0.0, pairs: int = 3
) -> Iterator[Opening]:
    """Openings of an engine and one that takes so many times as long.

    Args:
        slower: how many times as long.
        foreign: cores that others use.
        seed: of what is drawn.
        spread: how far runs of a process scatter.
        lucky: how far processes do.
        pairs: of an opening.
    """
    rng = np.random.default_rng(seed)

    def run(scale: float) -> Sample:
        return Sample(ttft_ms=50 * scale * rng.lognormal(0, spread), token_ms=(20 * scale * rng.lognormal(0, spread),))

    while True:
        a, b = rng.lognormal(0, lucky), slower * rng.lognormal(0, lucky)
        yield tuple(
            Pair(baseline=(run(a), run(a)), candidate=(run(b), run(b)), foreign_cores=foreign) for _ in range(pairs)
        )


def outcomes(checks: tuple[gate.Check, ...]) -> dict[str, str]:
    return {check.metric: check.outcome for check in checks}


@pytest.mark.parametrize(("slower", "wanted"), [(1.0, "pass"), (0.8, "pass"), (1.1, "fail")])
def test_engines_are_opened_until_all_is_decided(slower: float, wanted: str) -> None:
    found = gate.timed(openings(slower), SPEED, Clock())
    assert outcomes(found.checks) == {"tpot_ms": wanted, "ttft_ms": wanted}
    assert len(found.openings) in (8, 12, 18)
    assert found.pairs == 3 * len(found.openings)
    assert gate.verdict(found.checks) == wanted
    speed = found.checks[0]
    assert speed.ratio == pytest.approx(slower, rel=0.02)
    assert speed.value == pytest.approx(20 * slower, rel=0.02)
    assert speed.baseline == pytest.approx(20, rel=0.02)
    assert (speed.limit, speed.samples) == (1.03, len(found.openings))


def test_what_is_not_decided_when_the_time_is_up_stays_undecided() -> None:
    found = gate.timed(openings(1.03, spread=0.2), SPEED.model_copy(update={"budget_s": 20}), Clock())
    assert "undecided" in outcomes(found.checks).values()
    assert gate.verdict(found.checks) == "undecided"


def test_pairs_beside_others_work_do_not_count() -> None:
    def mixed() -> Iterator[Opening]:
        quiet, busy = openings(1.0), openings(2.0, foreign=1.0)
        while True:
            yield next(busy)[:2] + next(quiet)[:2]

    found = gate.timed(mixed(), SPEED, Clock())
    assert gate.verdict(found.checks) == "pass"
    assert found.disturbed == found.pairs == 2 * len(found.openings)
    never = gate.timed(openings(1.5, foreign=1.0, pairs=1), SPEED, Clock())
    assert gate.verdict(never.checks) == "undecided"
    assert "59 pairs were measured while others used the machine" in never.checks[0].detail


def test_a_process_that_is_slow_for_as_long_as_it_lives_is_no_slow_engine() -> None:
    said = [gate.timed(openings(1.0, lucky=0.05, seed=seed, pairs=6), SPEED, Clock()).checks for seed in range(40)]
    assert sum(check.outcome == "fail" for checks in said for check in checks) <= 1
    # As many pairs of two processes alone would tell one from the other.
    alone = [
        gate.judged([(pair,) for pair in next(openings(1.0, lucky=0.05, seed=seed, pairs=48))], SPEED)
        for seed in range(40)
    ]
    assert sum(check.outcome == "fail" for checks in alone for check in checks.values()) > 10


def test_noise_is_what_could_not_be_told_from_none() -> None:
    stream = openings(1.0, spread=0.05)
    rises = gate.noise([next(stream) for _ in range(40)], SPEED)
    assert all(0.005 < rise < 0.08 for rise in rises.values())


@pytest.mark.parametrize(("slower", "wanted"), [(0.8, "pass"), (0.95, "fail"), (1.0, "fail")])
def test_a_fall_can_be_asked_for(slower: float, wanted: str) -> None:
    asked = Gates(speed={"tpot_ms": -0.1}, size={"parameters": -0.2})
    assert outcomes(gate.timed(openings(slower), asked, Clock()).checks) == {"tpot_ms": wanted}
    assert gate.sized("parameters", 100 * slower, 100, "", asked.size["parameters"]).outcome == wanted


def test_sizes_know_no_chance() -> None:
    assert gate.sized("bytes_on_disk", 101, 100, "B", 0.02).outcome == "pass"
    assert gate.sized("bytes_on_disk", 103, 100, "B", 0.02).outcome == "fail"


def row(difference: float, error: float, *, higher: bool, value: float = 0.5) -> EvalRow:
    return EvalRow(
        metric="m",
        higher_is_better=higher,
        target=Estimate(value=value, error=error, n=30),
        baseline=Estimate(value=value - difference, error=error, n=30),
        difference=Estimate(value=difference, error=error, n=30),
    )


@pytest.mark.parametrize(
    ("difference", "error", "higher", "wanted"),
    [
        (0.30, 0.05, False, "fail"),  # nats rose, surely by more than 0.1
        (0.30, 0.20, False, "undecided"),
        (0.05, 0.20, False, "pass"),
        (-0.30, 0.05, True, "fail"),  # fewer problems are solved
        (0.30, 0.05, True, "pass"),
    ],
)
def test_quality_fails_only_where_the_fall_is_sure(difference: float, error: float, higher: bool, wanted: str) -> None:
    (check,) = gate.graded("t", row(difference, error, higher=higher), QualityGate(max_worse=0.1))
    assert check.outcome == wanted


def test_a_value_may_be_bounded_whatever_the_baseline() -> None:
    (check,) = gate.graded("kl", row(0, 0.01, higher=False), QualityGate(max_value=0.1))
    assert (check.outcome, check.limit, check.samples) == ("fail", 0.1, 30)


@pytest.mark.parametrize(("bound", "wanted"), [(0.4, "pass"), (0.5, "pass"), (0.51, "undecided"), (0.6, "fail")])
def test_what_should_be_high_may_have_a_least_value(bound: float, wanted: str) -> None:
    (check,) = gate.graded("humaneval", row(0, 0.02, higher=True), QualityGate(min_value=bound))
    assert (check.outcome, check.limit) == (wanted, bound)
    assert f"at least {bound:g}" in verdict_files.as_markdown([check])
    assert verdict_files.as_benchmark([check]) == []  # a list of what should be low


def test_a_bound_on_the_good_side_is_refused() -> None:
    for higher, wrong in ((True, QualityGate(max_value=0.3)), (False, QualityGate(min_value=0.3))):
        with pytest.raises(UsageError, match="bounds the good side"):
            gate.graded("lm-eval:t", row(0, 0.01, higher=higher), wrong)


def test_a_fall_that_cannot_be_measured_is_refused_and_not_passed_over() -> None:
    alone = row(0, 0.01, higher=False).model_copy(update={"difference": None})
    with pytest.raises(UsageError, match="kl has no difference to a baseline"):
        gate.graded("kl", alone, QualityGate(max_worse=0.1))


def test_an_engine_without_proof_fails() -> None:
    assert gate.proven(None).outcome == "fail"
    assert gate.proven({"holds": True, "kl": 1e-9}).outcome == "pass"
    assert gate.proven({"holds": False, "kl": 1.0}).outcome == "fail"


CHECKS = [
    gate.sized("bytes_on_disk", 103, 100, "B", 0.02),
    gate.proven({"holds": True, "kl": 1e-9}),
    gate.Check(metric="tpot_ms", kind="speed", outcome="undecided", samples=3, detail="3 pairs <counted>"),
]


def test_files_for_people_and_for_ci(tmp_path: Path) -> None:
    verdict_files.write(CHECKS, tmp_path, {"environment": {"cpu": "x"}})
    content = json.loads((tmp_path / "gate.json").read_text())
    assert content["verdict"] == "fail"
    assert [each["outcome"] for each in content["checks"]] == ["fail", "pass", "undecided"]
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert [case.get("name") for case in suite] == ["bytes_on_disk", "parity", "tpot_ms"]
    assert "+3.0%" in str(suite[0][0].get("message"))
    assert "<counted>" in str(suite[2][0].get("message"))
    summary = (tmp_path / "summary.md").read_text()
    assert "| bytes_on_disk | 100 B | 103 B | +3.0% | +2.0% | - | ❌ fail |" in summary
    assert json.loads((tmp_path / "benchmark.json").read_text()) == [
        {"name": "bytes_on_disk", "unit": "B", "value": 103.0, "extra": "fail"}
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("speed: {tpot: 0.03}", r"speed: .*Did you mean 'tpot_ms'"),
        ("speed: {tpot_ms: -1}", "greater than -1"),
        ("sped: {}", "sped: Unknown field 'sped'. Did you mean 'speed'"),
        ("a: [", "not valid YAML"),
        ("", "top level: Input should be a valid dictionary"),
        ("parity: false", "these gates let everything through"),
        ("quality: {kl: {}}", "quality.kl: expected max_worse, max_value or min_value"),
        ("quality: {humanevl: {max_worse: 0.1}}", "Did you mean 'humaneval'"),
        ("quality: {humaneval: {max_value: 0.3}}", "more is better of humaneval: expected min_value"),
        ("quality: {perplexity: {min_value: 3}}", "less is better of perplexity: expected max_value"),
        ("quality: {kl: {max_worse: 0.1}}", "kl is a comparison already: expected max_value"),
    ],
)
def test_a_wrong_gates_file_names_the_field(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "gates.yaml").write_text(text)
    with pytest.raises(RecipeError, match=problem):
        gates.load(tmp_path / "gates.yaml")
