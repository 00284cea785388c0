"""Customised data: the tasks that a cut model fails, with the dense model's own answers where these are right.

Flab-Pruner (Fang et al., 2024) trains a pruned model on such data: what it can still do is not repeated, and what the
dense model says is nearer to what is left of it than what a person wrote.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flabc import artifact
from flabc.console import note
from flabc.errors import CorpusError, UsageError
from flabc.frozen import Frozen
from flabc.runtime.evaluate import generation
from flabc.runtime.evaluate.problem import Problem
from flabc.runtime.evaluate.record import Record
from flabc.runtime.evaluate.source import field, read_jsonl
from flabc.runtime.evaluate.subject import Local
from flabc.runtime.evaluate.task import EvalOptions, check
from flabc.runtime.evaluate.tasks import mined
from flabc.source import Source, model_folder


class Customised(Frozen):
    """What became of the tasks.

    Args:
        path: the file.
        tasks: rows that were read.
        asked: those not of the side test.
        failed: those that the cut model fails: the rows of the file.
        teacher: those of which the dense model's answer passes, and is the target.
        canonical: those that both fail, whose solution stays.
    """

    path: Path
    tasks: int
    asked: int
    failed: int
    teacher: int
    canonical: int


def customise(
    tasks: str | Path, model: str, teacher: str, output: str | Path, options: EvalOptions, *, force: bool = False
) -> Customised:
    """Ask the cut model, then the dense one about what that fails, and write what is left to learn.

    A run that is cut off goes on where it was: its answers lie in ``OUTPUT.partial``.

    Args:
        tasks: JSON lines as ``flabc data mine`` writes them.
        model: the cut model: a checkpoint or an engine.
        teacher: the dense one.
        output: the file to write; each row says in ``target`` whose answer it has, ``teacher`` or ``canonical``.
        options: how they are asked; greedily, by raw completion.
        force: replace a file, and begin a run anew that was cut off.

    Raises:
        UsageError: if the file exists, or model-written code may not run.
        CorpusError: if there is no task to ask, or the cut model fails none.
    """
    out = Path(output)
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists.", fix="Give another -o, or --force to replace a file.")
    options = options.model_copy(
        update={"task": "mined", "data": None, "samples": 1, "temperature": 0.0, "chat": False}
    )
    check(options)
    rows = read_jsonl(Path(tasks))
    asked = [row for row in rows if field(row, "split") != "test"]
    _check_rows(asked, tasks)
    with model_folder(model) as cut, model_folder(teacher) as dense:
        identity = {
            "options": options.identity(),
            "tasks": artifact.sha256(Path(tasks)),
            "models": [cut.identity(), dense.identity()],
        }
        with artifact.unfinished(out, identity, force=force) as folder:
            failed = _without(asked, _answers(asked, cut, options, folder / "model", "the cut model"))
            if not failed:
                raise CorpusError(f"The model solves all {len(asked)} tasks: there is nothing left to learn of them.")
            right = _right(_answers(failed, dense, options, folder / "teacher", "the dense model"))
            rows_left = (json.dumps(_targeted(row, right)) + "\n" for row in failed)
            artifact.write_whole(out, "".join(rows_left))
    return Customised(
        path=out,
        tasks=len(rows),
        asked=len(asked),
        failed=len(failed),
        teacher=len(right),
        canonical=len(failed) - len(right),
    )


def _check_rows(rows: Sequence[Mapping[str, Any]], file: str | Path) -> None:
    """Before a model is opened."""
    for row in rows:
        mined.solution(row)
    mined.check_imports(rows)
    if not rows:
        raise CorpusError(f"{file} has no task of the splits train or dev.")
    if len({row["task_id"] for row in rows}) < len(rows):
        raise CorpusError(f"Some tasks of {file} have the same task_id.", expected="each its own")


def _answers(
    rows: Sequence[dict[str, Any]], source: Source, options: EvalOptions, folder: Path, label: str
) -> list[Record]:
    """A model's answers, graded; it is gone from memory when this returns."""
    problems: list[Problem] = [mined.problem(row) for row in rows]
    folder.mkdir(exist_ok=True)
    subject = Local(source.folder, options, [problem.prompt for problem in problems])
    records, _ = generation.run(problems, subject, options, folder, label)
    note(f"{label} solves {sum(record.score or 0 for record in records):.0f} of {len(records)}")
    return records


def _right(records: Sequence[Record]) -> dict[str, str]:
    """The answers that pass, by task."""
    return {record.task_id: record.completion for record in records if record.score}


def _without(rows: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[dict[str, Any]]:
    solved = _right(records)
    return [row for row in rows if str(row["task_id"]) not in solved]


def _targeted(row: Mapping[str, Any], right: Mapping[str, str]) -> dict[str, Any]:
    answer = right.get(str(row["task_id"]))
    if answer is None:
        return {**row, "canonical_solution": mined.solution(row), "target": "canonical"}
    return {**row, "canonical_solution": f"{answer.rstrip()}\n", "target": "teacher"}
