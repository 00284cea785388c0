"""What an evaluation leaves behind: a table, the records it was made of, and a page to look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

from flabc.frozen import Frozen
from flabc.runtime.evaluate.record import Record, read
from flabc.runtime.evaluate.task import EvalOptions

from .comparison import Estimate, EvalRow

#: Files of an evaluation's folder; the records are one JSON object per line.
RESULT, HTML, MARKDOWN = "eval.json", "report.html", "report.md"

#: Stands where there is no figure.
NONE = "-"

#: Metrics without a unit are shares.
_FORMATS = {"": "{:.1f} %", "ppl": "{:.4f}", "nats": "{:.4f}", "bits": "{:.4f}"}


class EvalSide(Frozen):
    """A model and what asking it took.

    Args:
        model: as the person named it.
        parameters: parameters of the model; None for a server.
        tokens: tokens produced, those of an earlier run that this one went on from included.
        seconds: wall time to answer and grade; None if an earlier run had answered a part.
    """

    model: str
    parameters: int | None
    tokens: int | None = None
    seconds: float | None = None


class EvalResult(Frozen):
    """An evaluation.

    Args:
        created: when it was finished.
        environment: machine and software.
        options: what was measured, and how.
        target, baseline: the models.
        rows: the table.
        unprotected: what the sandbox could not protect on this system; empty if nothing or if nothing was run.
    """

    created: datetime
    environment: dict[str, Any]
    options: EvalOptions
    target: EvalSide
    baseline: EvalSide | None = None
    rows: tuple[EvalRow, ...]
    unprotected: tuple[str, ...] = ()


def write(result: EvalResult, records: dict[str, list[Record]], folder: Path) -> None:
    """Write the result, every record, and the two reports.

    Args:
        result: the table and what it is about.
        records: by side.
        folder: where; it exists.
    """
    (folder / RESULT).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for side, rows in records.items():
        text = "".join(record.model_dump_json() + "\n" for record in rows)
        (folder / f"{side}.jsonl").write_text(text, encoding="utf-8")
    (folder / HTML).write_text(_page(result, records), encoding="utf-8")
    (folder / MARKDOWN).write_text(markdown(result), encoding="utf-8")


def read_records(folder: Path, side: str = "target") -> list[Record]:
    """The records of a side."""
    return read(folder / f"{side}.jsonl", Record)


def markdown(result: EvalResult) -> str:
    """The table and what it is about, as Markdown."""
    head = f"# {result.options.task}: {_title(result)}\n"
    facts = [f"- {name}: {value}" for name, value in about(result).items()]
    return "\n".join([head, table(result.rows), "", *facts, ""])


def table(rows: Sequence[EvalRow]) -> str:
    """Rows as a Markdown table; without the columns of a baseline if there is none."""
    paired = any(row.baseline for row in rows)
    titles = ["metric", *(["baseline"] if paired else []), "target", *(["difference", "p", "n"] if paired else ["n"])]
    lines = [titles, [":---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        compared = [difference(row), p_text(row)] if paired else []
        lines.append(
            [
                row.metric,
                *([estimate(row, row.baseline)] if paired else []),
                estimate(row, row.target),
                *compared,
                str(row.target.n),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def estimate(row: EvalRow, found: Estimate | None) -> str:
    """``42.7 % ± 3.9`` with the standard error, in the metric's unit."""
    if found is None:
        return NONE
    scale = 1 if row.unit else 100
    text = _FORMATS[row.unit].format(scale * found.value)
    if found.error is None:
        return text
    return f"{text} ± {scale * found.error:{'.4f' if row.unit else '.1f'}}"


def difference(row: EvalRow) -> str:
    """``-3.0 ± 1.5 (2 gained, 7 lost)``; shares in percentage points."""
    if row.difference is None:
        return NONE
    scale, digits = (1, ".4f") if row.unit else (100, ".1f")
    error = "" if row.difference.error is None else f" ± {scale * row.difference.error:{digits}}"
    moved = "" if row.gained is None else f" ({row.gained} gained, {row.lost} lost)"
    return f"{scale * row.difference.value:+{digits}}{error}{moved}"


def p_text(row: EvalRow) -> str:
    """``0.031``, or ``<0.001``."""
    if row.p_value is None:
        return NONE
    return "<0.001" if row.p_value < 0.001 else f"{row.p_value:.3f}"


def about(result: EvalResult) -> dict[str, str]:
    """What a reader needs to repeat it."""
    options = result.options
    facts = {"target": _side(result.target)}
    if result.baseline is not None:
        facts["baseline"] = _side(result.baseline)
    facts["task"] = options.task
    changed = options.model_dump(mode="json", exclude_defaults=True, exclude={"task"})
    facts |= {name.replace("_", " "): str(value) for name, value in changed.items()}
    facts["machine"] = f"{result.environment['cpu']}, {result.environment['logical_cores']} cores"
    facts["measured"] = result.created.isoformat()
    facts["±"] = "one standard error, over problems or documents"
    tests = sorted({row.test for row in result.rows if row.test})
    if tests:
        facts["p"] = f"two-sided, paired: {', '.join(tests)}; not corrected for the number of rows"
    if result.unprotected:
        facts["sandbox"] = " ".join(result.unprotected)
    return facts


class Pair(Frozen):
    """A problem as both sides answered it; ``state`` is gained, lost, both or neither (pass or fail: one side)."""

    task_id: str
    state: str
    target: tuple[Record, ...]
    baseline: tuple[Record, ...] = ()


#: The states in the order in which a reader wants them.
STATES = {
    "lost": "Lost: the baseline is better",
    "gained": "Gained: the target is better",
    "neither": "Neither is right",
    "both": "Both alike",
    "fail": "Failed",
    "pass": "Passed",
}


def pairs(target: Sequence[Record], baseline: Sequence[Record] | None) -> Iterator[Pair]:
    """Problems with the answers of both sides, in the target's order."""
    ours, theirs = _by_task(target), _by_task(baseline or ())
    for task_id, answers in ours.items():
        if answers[0].score is None:
            continue
        others = theirs.get(task_id, ())
        mine = _mean(answers)
        if not others:
            state = "pass" if mine > 0 else "fail"
        elif mine == _mean(others):
            state = "both" if mine > 0 else "neither"
        else:
            state = "gained" if mine > _mean(others) else "lost"
        yield Pair(task_id=task_id, state=state, target=answers, baseline=others)


def _page(result: EvalResult, records: dict[str, list[Record]]) -> str:
    import jinja2

    source = resources.files("flabc.perf").joinpath("evaluation.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found = list(pairs(records["target"], records.get("baseline")))
    return page.from_string(source).render(
        result=result,
        title=_title(result),
        about=about(result),
        groups={state: [pair for pair in found if pair.state == state] for state in STATES},
        states=STATES,
        estimate=estimate,
        difference=difference,
        p_text=p_text,
    )


def _title(result: EvalResult) -> str:
    return f"{result.target.model} against {result.baseline.model}" if result.baseline else result.target.model


def _side(side: EvalSide) -> str:
    parts = [side.model]
    parts += [f"{side.parameters / 1e6:.1f} M parameters"] if side.parameters else []
    parts += [f"{side.tokens:,} tokens produced"] if side.tokens else []
    parts += [f"{side.seconds:.0f} s"] if side.seconds else []
    return ", ".join(parts)


def _by_task(records: Sequence[Record]) -> dict[str, tuple[Record, ...]]:
    found: dict[str, tuple[Record, ...]] = {}
    for record in records:
        found[record.task_id] = (*found.get(record.task_id, ()), record)
    return found


def _mean(records: Sequence[Record]) -> float:
    return sum(record.score or 0 for record in records) / len(records)
