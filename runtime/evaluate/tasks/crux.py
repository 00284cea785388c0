"""CRUXEval (Gu et al., 2024): what does this call return, and which call returns this?

The prompt is the code and the beginning of an assertion; the paper's examples and its chain of thought are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flabc.errors import CorpusError
from flabc.runtime.evaluate.problem import Problem, Program, Value
from flabc.runtime.evaluate.source import field, read_jsonl

STOP = ("\n",)


def outputs(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """CRUXEval-O: the call is shown, its value asked for and compared.

    Raises:
        CorpusError: if no file is given, or it is no such file.
    """
    return [
        output_problem(str(field(row, "id")), field(row, "code"), f"f({field(row, 'input')})", field(row, "output"))
        for row in _rows(source)
    ]


def inputs(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """CRUXEval-I: the value is shown, arguments that lead to it are asked for, and the assertion is run.

    Raises:
        CorpusError: if no file is given, or it is no such file.
    """
    return [_input_problem(row) for row in _rows(source)]


def output_problem(task_id: str, code: str, call: str, expected: str, group: str = "") -> Problem:
    """What does this call return?"""
    return Problem(
        task_id=task_id,
        prompt=f"{code.rstrip()}\n\nassert {call} ==",
        instruction=f"```python\n{code.rstrip()}\n```\nWhat does `{call}` return? Answer with the value only, as a "
        "Python literal in one code block.",
        stop=STOP,
        grading=Value(expected),
        group=group,
    )


def _input_problem(row: dict[str, Any]) -> Problem:
    code, output = field(row, "code").rstrip(), field(row, "output")
    prompt = f"{code}\n\nassert {output} == f("
    return Problem(
        task_id=str(field(row, "id")),
        prompt=prompt,
        instruction=f"```python\n{code}\n```\nFor which arguments does f return `{output}`? Answer with one assertion "
        f"in one code block: `assert {output} == f(...)`.",
        stop=STOP,
        grading=Program(before=prompt, after="", context=code),
    )


def _rows(source: Path | None) -> list[dict[str, Any]]:
    if source is None:
        raise CorpusError("The task crux needs its file.", fix="Give --data cruxeval.jsonl.")
    return read_jsonl(source)
