"""Mined tasks: functions of real code with executable tests, one JSON object per line.

Fields: ``task_id``, ``prompt`` (signature and docstring), ``canonical_solution``, ``test`` (code that runs behind them
and fails by raising), ``split`` (train, dev or test). ``flabc data mine`` writes such files.
"""

from __future__ import annotations

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
        CorpusError: if no file is given, or it has no task of these splits.
        UnknownNameError: if a split is neither dev nor test.
    """
    if source is None:
        raise CorpusError("The task mined needs its file.", fix="Give --data tasks.jsonl.")
    wanted = tuple(choices) or ("test",)
    for name in wanted:
        if name not in SPLITS:
            raise UnknownNameError("split", name, SPLITS)
    found = [problem(row) for row in read_jsonl(source) if field(row, "split") in wanted]
    if not found:
        raise CorpusError(f"{source} has no task of the split {' or '.join(wanted)}.")
    return found


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
