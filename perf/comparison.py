"""Evaluations as rows: a figure and its standard error for each side, their difference, and how sure it is.

What counts as one observation is a unit: a problem, with all of its samples and questions, or a document. Standard
errors are over units (E. Miller, "Adding Error Bars to Evals", 2024). Differences are paired by unit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import exp, log

import numpy as np

from flabc.frozen import Frozen
from flabc.runtime.evaluate.record import Record
from flabc.runtime.evaluate.task import KL, PERPLEXITY, TASKS, EvalOptions
from flabc.runtime.evaluate.tasks import robustness

from .estimates import Floats, mcnemar, mean_error, paired_test, pass_at_k, ratio_error

#: The paired tests, as the table names them.
MCNEMAR, SIGN_FLIPS = "exact McNemar", "sign flips"

#: By unit.
Values = Mapping[str, float]


class Estimate(Frozen):
    """A figure and its standard error, over ``n`` units; the error of a single unit is unknown."""

    value: float
    error: float | None
    n: int


class EvalRow(Frozen):
    """One line of the table.

    Args:
        metric: what was measured.
        unit: ``""`` for shares, which are shown in percent, otherwise what the number counts.
        higher_is_better: which way is up.
        target, baseline: each side; the baseline is None if there was none.
        difference: target less baseline, paired by unit.
        p_value: of the hypothesis that there is no difference; ``test`` names how.
        gained, lost: problems that only the target, or only the baseline, solves.
    """

    metric: str
    unit: str = ""
    higher_is_better: bool = True
    target: Estimate
    baseline: Estimate | None = None
    difference: Estimate | None = None
    p_value: float | None = None
    test: str | None = None
    gained: int | None = None
    lost: int | None = None


def compare(options: EvalOptions, target: Sequence[Record], baseline: Sequence[Record] | None) -> list[EvalRow]:
    """The table of an evaluation.

    Args:
        options: what was measured.
        target: the records of the model in question.
        baseline: those of the model it is compared with.
    """
    if options.name == PERPLEXITY:
        return _perplexity(target, baseline)
    if options.name == KL:
        return list(_divergence(target))
    return [*_graded(options, target, baseline), *_drops(options, target, baseline)]


def _graded(options: EvalOptions, target: Sequence[Record], baseline: Sequence[Record] | None) -> Iterator[EvalRow]:
    ours, theirs = _by_kind(target), _by_kind(baseline or ())
    for kind, records in ours.items():
        for k in options.ks:
            yield row(
                _metric(options, kind, k),
                _pass_at_k(records, k),
                _pass_at_k(theirs[kind], k) if kind in theirs else None,
            )


def _metric(options: EvalOptions, kind: str, k: int) -> str:
    task = TASKS.get(options.name)
    if task is None:
        return kind  # lm-evaluation-harness names its own
    metric = task.metric.replace("@1", f"@{k}")
    return f"{kind}: {metric}" if kind else metric


def _drops(options: EvalOptions, target: Sequence[Record], baseline: Sequence[Record] | None) -> Iterator[EvalRow]:
    """What each perturbation costs: nominal less perturbed, over the problems that it changes."""
    if options.name != "robustness":
        return
    ours, theirs = _by_kind(target), _by_kind(baseline or ())
    for kind in ours:
        if kind in (robustness.NOMINAL, robustness.PARTIAL):
            continue
        base = robustness.nominal_row(kind)
        other = _drop(theirs[base], theirs[kind]) if kind in theirs else None
        yield row(f"{kind}: drop", _drop(ours[base], ours[kind]), other, higher_is_better=False)


def row(metric: str, target: Values, baseline: Values | None, *, higher_is_better: bool = True) -> EvalRow:
    """A row of means over units; differences over the units that both sides have."""
    ours = _estimate(list(target.values()))
    if baseline is None:
        return EvalRow(metric=metric, target=ours, higher_is_better=higher_is_better)
    both = [unit for unit in target if unit in baseline]
    a, b = [target[unit] for unit in both], [baseline[unit] for unit in both]
    binary = {*a, *b} <= {0.0, 1.0}
    gained = sum(x > y for x, y in zip(a, b, strict=True))
    lost = sum(x < y for x, y in zip(a, b, strict=True))
    return EvalRow(
        metric=metric,
        higher_is_better=higher_is_better,
        target=ours,
        baseline=_estimate(list(baseline.values())),
        difference=_estimate([x - y for x, y in zip(a, b, strict=True)]),
        p_value=mcnemar(gained, lost) if binary else paired_test(a, b),
        test=MCNEMAR if binary else SIGN_FLIPS,
        gained=gained if binary else None,
        lost=lost if binary else None,
    )


def _perplexity(target: Sequence[Record], baseline: Sequence[Record] | None) -> list[EvalRow]:
    """Perplexity is per token of the baseline for both, where there is one: a pruned vocabulary cuts other tokens."""
    names = [record.task_id for record in target]
    ours = _column(target, names, "nll_nats")
    theirs = None if baseline is None else _column(baseline, names, "nll_nats")
    tokens = _column(baseline or target, names, "tokens")
    label = "perplexity per token" + (" of the baseline" if baseline else "")
    return [
        _ratio_row(label, "ppl", ours, theirs, tokens, exp),
        _ratio_row("bits per byte", "bits", ours, theirs, _column(target, names, "bytes"), lambda nats: nats / log(2)),
    ]


def _ratio_row(
    metric: str, unit: str, target: Floats, baseline: Floats | None, sizes: Floats, finish: Callable[[float], float]
) -> EvalRow:
    """A row of ``finish(sum of target / sum of sizes)`` over documents, (n,) each."""
    ours = _ratio(target, sizes, finish)
    if baseline is None:
        return EvalRow(metric=metric, unit=unit, higher_is_better=False, target=ours)
    theirs = _ratio(baseline, sizes, finish)
    error = ratio_error(target - baseline, sizes)
    slope = _slope(finish, float(target.sum() / sizes.sum()))
    return EvalRow(
        metric=metric,
        unit=unit,
        higher_is_better=False,
        target=ours,
        baseline=theirs,
        difference=Estimate(
            value=ours.value - theirs.value, error=None if error is None else error * slope, n=len(sizes)
        ),
        p_value=paired_test(list(target / sizes), list(baseline / sizes)),
        test=SIGN_FLIPS,
    )


def _ratio(sums: Floats, sizes: Floats, finish: Callable[[float], float]) -> Estimate:
    mean, error = float(sums.sum() / sizes.sum()), ratio_error(sums, sizes)
    return Estimate(value=finish(mean), error=None if error is None else error * _slope(finish, mean), n=len(sizes))


def _slope(finish: Callable[[float], float], at: float) -> float:
    """By how much an error grows in ``finish``, to first order."""
    return (finish(at + 1e-6) - finish(at - 1e-6)) / 2e-6


def _column(records: Sequence[Record], names: Sequence[str], number: str) -> Floats:
    """A number of each document, in the order of ``names``."""
    found = {record.task_id: record.numbers[number] for record in records}
    return np.array([found[name] for name in names], np.float64)


def _divergence(records: Sequence[Record]) -> Iterator[EvalRow]:
    names = [record.task_id for record in records]
    sizes = _column(records, names, "positions")
    for metric, name, unit, better in (
        ("KL to the baseline per token", "kl_nats", "nats", False),
        ("same most likely token", "agree", "", True),
        ("baseline's probability of tokens that were cut", "outside", "", False),
    ):
        mean = _ratio(_column(records, names, name), sizes, lambda value: value)
        yield EvalRow(metric=metric, unit=unit, higher_is_better=better, target=mean)


def _by_kind(records: Iterable[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        found[record.kind].append(record)
    return dict(found)


def _pass_at_k(records: Iterable[Record], k: int) -> dict[str, float]:
    """By unit, the mean over its questions of pass@k over their samples."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        scores[record.unit, record.task_id].append(float(record.score or 0))
    by_unit: dict[str, list[float]] = defaultdict(list)
    for (unit, _), each in scores.items():
        by_unit[unit].append(pass_at_k(len(each), sum(each), k) if k > 1 else sum(each) / len(each))
    return {unit: sum(each) / len(each) for unit, each in by_unit.items()}


def _drop(nominal: Iterable[Record], perturbed: Iterable[Record]) -> dict[str, float]:
    before, after = _pass_at_k(nominal, 1), _pass_at_k(perturbed, 1)
    return {unit: before[unit] - after[unit] for unit in after}


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(value=sum(values) / len(values), error=mean_error(values), n=len(values))
