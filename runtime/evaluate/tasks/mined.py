"""Mined tasks: functions of real code with executable tests, one JSON object per line.

Fields: ``task_id``, ``prompt`` (signature and docstring), ``canonical_solution``, ``test`` (code that runs behind them
and fails by raising), ``split`` (train, dev or test), and, if packages have to be installed, ``imports``: the modules
that prompt and test need. The sandbox shows what is installed beside flabc. ``flabc data mine`` writes such files.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flabc.errors import CorpusError, UnknownNameError
from flabc.runtime.evaluate.problem import Problem, Program
from flabc.runtime.evaluate.source import field, read_jsonl

from .humaneval import STOP, instruction

#: The sides that a model may be measured on; nothing is ever measured on ``train``.
SPLITS = ("dev", "test")

#: What rows of tasks call the answer.
SOLUTIONS = ("canonical_solution", "solution", "completion")


def problems(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """The tasks of the splits chosen, by default ``test``.

    Raises:
        CorpusError: if no file is given, it has no task of these splits, or they need what is not installed.
        UnknownNameError: if a split is neither dev nor test.
    """
    if source is None:
        raise CorpusError("The task mined needs its file.", fix="Give --data tasks.jsonl.")
    wanted = tuple(choices) or ("test",)
    for name in wanted:
        if name not in SPLITS:
            raise UnknownNameError("split", name, SPLITS)
    rows = [row for row in read_jsonl(source) if field(row, "split") in wanted]
    if not rows:
        raise CorpusError(f"{source} has no task of the split {' or '.join(wanted)}.")
    check_imports(rows)
    return [problem(row) for row in rows]


def check_imports(rows: Sequence[Mapping[str, Any]]) -> None:
    """Before a model is asked: every answer would be wrong where the tests cannot be run.

    Raises:
        CorpusError: if a task needs a package that is not installed here.
    """
    needed = Counter(top for row in rows for top in {str(name).split(".")[0] for name in row.get("imports") or ()})
    if lacking := [name for name in sorted(needed) if importlib.util.find_spec(name) is None]:
        raise CorpusError(
            f"{sum(needed[name] for name in lacking)} tasks need packages that are not installed.",
            expected=", ".join(lacking),
            fix="Install them beside flabc, or take the rows that name them in 'imports' out of the file.",
        )


def problem(row: dict[str, Any]) -> Problem:
    """A task as a problem, of whatever split."""
    return Problem(
        task_id=str(field(row, "task_id")),
        prompt=field(row, "prompt"),
        instruction=instruction(field(row, "prompt")),
        stop=STOP,
        grading=Program(field(row, "prompt"), field(row, "test"), context=field(row, "prompt")),
        kind=field(row, "split"),
    )


def solution(row: Mapping[str, Any]) -> str:
    """A task's own answer, which stands behind its prompt.

    Raises:
        CorpusError: if it has none, or no prompt.
    """
    for name in SOLUTIONS:
        if isinstance(row.get(name), str) and isinstance(row.get("prompt"), str):
            return str(row[name])
    raise CorpusError(
        "A row of the tasks has no prompt or no solution.",
        expected=f"the fields prompt and one of {', '.join(SOLUTIONS)}",
        found=", ".join(row) or "an empty object",
    )
