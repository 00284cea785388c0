"""Gate: from measurements to a verdict for each metric, and to one for all.

A metric fails only if its effect is above its limit, its interval excludes the limit, and there are enough samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from statistics import fmean, median
from typing import Any, Literal

from flabc.errors import UsageError
from flabc.frozen import Frozen
from flabc.runtime.measure.pairs import Opening, Pair

from .comparison import EvalRow
from .gates import SPEEDS, Gates, QualityGate
from .sequential import LOOKS, Effect, Outcome, decide, effect, share

Kind = Literal["speed", "size", "quality", "parity"]

#: How many standard errors make an interval of a quality figure.
ERRORS = 1.96


class Check(Frozen):
    """One metric's verdict.

    Args:
        metric: its name.
        kind: what it is about.
        outcome: ``undecided`` if it may lie on either side of its limit.
        value: what was measured of the candidate; for a speed its median.
        baseline: what was measured of the baseline.
        unit: of both.
        ratio: candidate over baseline.
        interval: of the ratio, or of the value where there is no ratio.
        limit: what ratio or value may not be above, or below where more is better.
        samples: openings of both engines, documents or problems.
        detail: in words.
        higher_is_better: which way is up for the value that is judged.
    """

    metric: str
    kind: Kind
    outcome: Outcome
    value: float | None = None
    baseline: float | None = None
    unit: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    limit: float | None = None
    samples: int | None = None
    detail: str = ""
    higher_is_better: bool = False


class Timed(Frozen):
    """What timing ended with: the checks, what counts, and how many pairs do not as others used the machine."""

    checks: tuple[Check, ...]
    openings: tuple[Opening, ...]
    disturbed: int = 0
    seconds: float = 0.0

    @property
    def pairs(self) -> int:
        """How many count."""
        return sum(map(len, self.openings))


def timed(openings: Iterator[Opening], gates: Gates, clock: Callable[[], float], unit: str = "ms") -> Timed:
    """Open engines again and again until every speed is decided or the time is up.

    Args:
        openings: measured as they are asked for.
        gates: limits, error and time.
        clock: seconds.
        unit: of the samples' times; a baseline's are multiples of the least that is possible.
    """
    began, kept, disturbed = clock(), list[Opening](), 0
    checks: dict[str, Check] = {}
    while clock() - began < gates.budget_s and len(kept) < LOOKS[-1]:
        found = next(openings)
        quiet = undisturbed(found, gates)
        disturbed += len(found) - len(quiet)
        if not quiet:
            continue
        kept.append(quiet)
        if len(kept) in LOOKS:
            checks = judged(kept, gates, unit)
            if all(check.outcome != "undecided" for check in checks.values()):
                break
    if not checks:
        checks = {name: _too_few(name, len(kept), disturbed) for name in gates.speed}
    return Timed(
        checks=tuple(checks.values()), openings=tuple(kept), disturbed=disturbed, seconds=round(clock() - began, 1)
    )


def undisturbed(opening: Opening, gates: Gates) -> Opening:
    """The pairs during which others left the machine alone."""
    return tuple(pair for pair in opening if pair.foreign_cores <= gates.max_foreign_cores)


def judged(openings: Sequence[Opening], gates: Gates, unit: str = "ms") -> dict[str, Check]:
    """What openings say of every speed at one look."""
    alpha = share(gates.alpha)
    effects = {name: effect(log_ratios(openings, name), 1 + rise, alpha=alpha) for name, rise in gates.speed.items()}
    outcomes = decide(effects, alpha=alpha)
    return {name: _speed(name, outcomes[name], found, openings, unit) for name, found in effects.items()}


def log_ratios(openings: Sequence[Opening], metric: str) -> list[float]:
    """The logarithm of candidate over baseline of a speed: one an opening, the mean of its pairs."""
    of = SPEEDS[metric]
    return [
        fmean(math.log(sum(map(of, pair.candidate)) / sum(map(of, pair.baseline))) for pair in opening)
        for opening in openings
    ]


def _speed(name: str, outcome: Outcome, found: Effect, openings: Sequence[Opening], unit: str) -> Check:
    of = SPEEDS[name]
    pairs = list(chain.from_iterable(openings))
    sides = [median(of(run) for pair in pairs for run in side(pair)) for side in (_candidate, _baseline)]
    return Check(
        metric=name,
        kind="speed",
        outcome=outcome,
        value=sides[0],
        baseline=sides[1],
        unit=unit,
        ratio=found.ratio,
        interval=found.interval,
        limit=found.limit,
        samples=found.count,
    )


def _candidate(pair: Pair) -> tuple[Any, ...]:
    return pair.candidate


def _baseline(pair: Pair) -> tuple[Any, ...]:
    return pair.baseline


def _too_few(name: str, kept: int, disturbed: int) -> Check:
    why = f"{kept} openings counted, {LOOKS[0]} are needed"
    if disturbed:
        why += f"; {disturbed} pairs were measured while others used the machine"
    return Check(metric=name, kind="speed", outcome="undecided", samples=kept, detail=why)


def sized(metric: str, value: float, baseline: float, unit: str, rise: float) -> Check:
    """A figure that is counted: no chance is in it."""
    ratio = value / baseline
    outcome: Outcome = "fail" if ratio > 1 + rise else "pass"
    return Check(
        metric=metric,
        kind="size",
        outcome=outcome,
        value=value,
        baseline=baseline,
        unit=unit,
        ratio=ratio,
        limit=1 + rise,
    )


def graded(task: str, row: EvalRow, gate: QualityGate) -> list[Check]:
    """A quality figure against its bounds: how much worse than the baseline's, and its value.

    Raises:
        UsageError: if it is to be compared with the baseline's, and there is no such comparison; or if it is bounded on
            the side on which it is good.
    """
    checks = []
    better, wrong = ("more", "max_value") if row.higher_is_better else ("less", "min_value")
    if getattr(gate, wrong) is not None:
        raise UsageError(f"{task}: {better} is better, and {wrong} bounds the good side.")
    if gate.max_worse is not None:
        if row.difference is None:
            fix = "Give max_value or min_value instead."
            raise UsageError(f"{task} has no difference to a baseline that max_worse could bound.", fix=fix)
        sign = -1 if row.higher_is_better else 1
        worse = sign * row.difference.value
        checks.append(_bounded(f"{task}: {row.metric}, worse by", worse, row.difference.error, gate.max_worse, row))
    bound = gate.min_value if row.higher_is_better else gate.max_value
    if bound is not None:
        value, error = row.target.value, row.target.error
        checks.append(_bounded(f"{task}: {row.metric}", value, error, bound, row, least=row.higher_is_better))
    return checks


def _bounded(name: str, value: float, error: float | None, bound: float, row: EvalRow, *, least: bool = False) -> Check:
    """No more samples can be had, so what is beyond its bound but not surely so stays undecided."""
    low, high = value - ERRORS * (error or 0.0), value + ERRORS * (error or 0.0)
    holds, surely_beyond = (value >= bound, high < bound) if least else (value <= bound, low > bound)
    outcome: Outcome = "pass" if holds else "fail" if surely_beyond else "undecided"
    return Check(
        metric=name,
        kind="quality",
        outcome=outcome,
        value=value,
        baseline=row.baseline.value if row.baseline else None,
        unit=row.unit,
        interval=(low, high),
        limit=bound,
        samples=row.target.n,
        higher_is_better=least,
    )


def proven(parity: Mapping[str, Any] | None) -> Check:
    """The proof that the engine carries."""
    if parity is None:
        return Check(metric="parity", kind="parity", outcome="fail", detail="the engine carries no proof")
    detail = f"KL to torch {parity['kl']:.2g} nats"
    return Check(metric="parity", kind="parity", outcome="pass" if parity["holds"] else "fail", detail=detail)


def verdict(checks: Sequence[Check]) -> Outcome:
    """One for all: a failure fails, else what is undecided leaves all undecided."""
    outcomes = {check.outcome for check in checks}
    return "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"


def noise(openings: Sequence[Opening], gates: Gates) -> dict[str, float]:
    """Of an engine against itself: the rise of each speed that these openings could not tell from none."""
    alpha = share(gates.alpha)
    intervals = {name: effect(log_ratios(openings, name), 1.0, alpha=alpha).interval for name in gates.speed}
    # Which of the two was slower is chance, so both ends count.
    return {name: max(high, 1 / low) - 1 for name, (low, high) in intervals.items()}
