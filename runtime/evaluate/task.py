"""What can be measured: the registry of tasks, and the options of a run.

A task is named ``name`` or ``name:choice,choice``. To add one that generates, write a function from an optional file
and the choices to problems, and list it in ``TASKS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from flabc.errors import UnknownNameError, UsageError
from flabc.frozen import Frozen

from .problem import Problem

Load = Callable[[Path | None, Sequence[str]], list[Problem]]


@dataclass(frozen=True)
class Task:
    """A task that generates.

    Args:
        load: ``module:function``, from an optional file and the choices to problems.
        metric: what a right answer counts towards.
        executes: whether answers are run.
    """

    load: str
    metric: str = "pass@1"
    executes: bool = True

    def problems(self, source: Path | None, choices: Sequence[str]) -> list[Problem]:
        """Load the problems."""
        module, function = self.load.split(":")
        load: Load = getattr(importlib.import_module(f"flabc.runtime.evaluate.tasks.{module}"), function)
        return load(source, choices)


#: Tasks that generate.
TASKS = {
    "humaneval": Task("humaneval:problems"),
    "evoeval": Task("humaneval:problems_of_file"),
    "mbpp": Task("mbpp:problems"),
    "mined": Task("mined:problems"),
    "robustness": Task("robustness:problems"),
    "crux": Task("crux:outputs", metric="exact match", executes=False),
    "crux-input": Task("crux:inputs"),
    "output-prediction": Task("output_prediction:problems", metric="exact match", executes=False),
}

#: Tasks that read what a model thinks of text, and the one that asks lm-evaluation-harness.
PERPLEXITY, KL, HARNESS = "perplexity", "kl", "lm-eval"

#: Every task by name.
NAMES = (PERPLEXITY, KL, *TASKS, HARNESS)


def parse(name: str) -> tuple[str, tuple[str, ...]]:
    """A task's name and its choices.

    Raises:
        UnknownNameError: if no task has the name.
    """
    base, _, rest = name.partition(":")
    if base not in NAMES:
        raise UnknownNameError("task", base, NAMES)
    return base, tuple(filter(None, rest.split(",")))


class EvalOptions(Frozen):
    """How a model is measured; the same for every side.

    Args:
        task: ``name`` or ``name:choice,choice``.
        data: the task's file, for tasks that come without one.
        corpus: the text of perplexity and kl.
        chat: ask through the model's chat template instead of letting it go on from the prompt.
        samples: answers per problem.
        k: the k of pass@k; none above ``samples``.
        temperature, top_p, max_tokens, seed: as in ``SamplingParams``; each answer has its own seed, made of this one.
        limit: the first so many problems or documents only.
        batch: sequences at once; requests at once if the target is a server.
        threads: threads for the computation.
        dtype: what torch computes in.
        tokenizer: a folder with the tokenizer of a server's model, which lm-eval may need.
        timeout_s: wall time of one program, in seconds.
        allow_code_execution: whether model-written code may run, in the sandbox.
    """

    task: str = PERPLEXITY
    data: Path | None = None
    corpus: str = "python-stdlib"
    chat: bool = False
    samples: int = Field(1, gt=0)
    k: tuple[int, ...] = (1, 10, 100)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(300, gt=0)
    seed: int = 0
    limit: int | None = Field(None, gt=0)
    batch: int = Field(64, gt=0)
    threads: int | None = Field(None, gt=0)
    dtype: str = "float32"
    tokenizer: Path | None = None
    timeout_s: float = Field(10.0, gt=0)
    allow_code_execution: bool = False

    @model_validator(mode="after")
    def _samples_differ(self) -> EvalOptions:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples need a temperature above 0: greedy answers are all the same")
        return self

    @property
    def name(self) -> str:
        """The task without its choices."""
        return parse(self.task)[0]

    @property
    def choices(self) -> tuple[str, ...]:
        """What follows the task's name."""
        return parse(self.task)[1]

    @property
    def ks(self) -> tuple[int, ...]:
        """The k of pass@k that the samples allow."""
        return tuple(k for k in self.k if k <= self.samples) or (1,)

    def identity(self) -> dict[str, Any]:
        """What answers and verdicts depend on: two runs with the same may share them."""
        return self.model_dump(mode="json", exclude={"k", "batch", "threads", "tokenizer", "allow_code_execution"})


def check(options: EvalOptions) -> None:
    """Refuse what cannot be measured, before a model is opened.

    Raises:
        UnknownNameError: for an unknown task.
        UsageError: if the task runs code and that is not allowed.
    """
    task = TASKS.get(options.name)
    if task is not None and task.executes and not options.allow_code_execution:
        raise UsageError(
            f"The task {options.name} runs code that a model wrote.",
            fix="It runs in a sandbox, and only with --allow-code-execution.",
        )


def problems(options: EvalOptions) -> list[Problem]:
    """The problems of the task, as many as ``limit`` allows.

    Raises:
        CorpusError: if the task's file is missing or is no such file.
        UnknownNameError: for an unknown choice.
    """
    found = TASKS[options.name].problems(options.data, options.choices)
    if options.limit is None:
        return found
    units = list(dict.fromkeys(problem.unit for problem in found))[: options.limit]
    wanted = set(units)
    return [problem for problem in found if problem.unit in wanted]
