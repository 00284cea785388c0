"""``flabc data``: tasks to train and measure on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .parameters import AT_LEAST_ONE, Group, emit, json_option

if TYPE_CHECKING:
    from flabc.customising import Customised
    from flabc.mining import Mined

OUTPUT = click.option(
    "-o", "--output", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The JSON lines to write."
)


@click.group(cls=Group)
def data() -> None:
    """Make tasks to train and to measure on.

    \b
    flabc data mine python-stdlib python-packages -o tasks.jsonl
    flabc data customise tasks.jsonl --model pruned --teacher smollm2-135m -o custom.jsonl --allow-code-execution
    """


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@OUTPUT
@click.option("--licence", "licences", multiple=True, help="Take code of this licence only, e.g. MIT; repeatable.")
@click.option("--keep-doctests", is_flag=True, help="Leave the doctests in the prompts, where they give answers away.")
@click.option("--timeout", "timeout_s", default=5.0, show_default=True, help="Seconds that a test may take.")
@click.option("--workers", type=AT_LEAST_ONE, help="Tests that run at once.  [default: the cores]")
@click.option("--allow-code-execution", is_flag=True, help="Run code even where the sandbox has gaps.")
@click.option("--force", is_flag=True, help="Replace a file.")
@json_option
def mine(
    sources: Sequence[str],
    output: Path,
    licences: Sequence[str],
    keep_doctests: bool,
    timeout_s: float,
    workers: int | None,
    allow_code_execution: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make tasks of functions that have docstrings, and doctests or tests.

    SOURCE is a folder, an archive (zip, whl, tar), the name of an installed package, python-stdlib, or
    python-packages: all that are installed. A task has the signature and the docstring, with what the function needs
    of its module before it, or, in an installed package, imports of that; the field imports names what has to be
    installed. Its doctests, taken out of the docstring, are the test, or those tests of its package that call no
    other function of it. Near-duplicates go, and what HumanEval has, and what does not pass its own test in the
    sandbox or passes it with an empty body. A project is on one side of train, dev and test.

    \b
    flabc data mine python-stdlib more-itertools ./src -o tasks.jsonl
    flabc data mine python-packages --licence MIT --licence BSD -o tasks.jsonl
    flabc eval engine --task mined:dev --data tasks.jsonl --allow-code-execution
    """
    from flabc import mining

    found = mining.mine(
        sources,
        output,
        licences=licences,
        keep_doctests=keep_doctests,
        timeout_s=timeout_s,
        workers=workers,
        allow_code_execution=allow_code_execution,
        force=force,
    )
    emit(as_json, found, lambda: _show(found))


@data.command()
@click.argument("tasks", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@OUTPUT
@click.option("--model", required=True, help="The cut model: a checkpoint or an engine.")
@click.option("--teacher", required=True, help="The model that was cut, or its engine.")
@click.option("--max-tokens", type=AT_LEAST_ONE, default=300, show_default=True, help="Tokens of an answer at most.")
@click.option("--batch", type=AT_LEAST_ONE, default=64, show_default=True, help="Sequences at once.")
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--dtype", default="float32", show_default=True, help="What torch computes in: float32 or bfloat16.")
@click.option("--timeout", "timeout_s", default=10.0, show_default=True, help="Seconds that a program may take.")
@click.option("--allow-code-execution", is_flag=True, help="Let code that the models wrote run, in a sandbox.")
@click.option("--force", is_flag=True, help="Replace a file, and begin a run anew that was cut off.")
@json_option
def customise(tasks: Path, output: Path, model: str, teacher: str, force: bool, as_json: bool, **options: Any) -> None:
    """Keep of TASKS what the cut model fails, with the dense model's answers where they pass (Flab-Pruner).

    Where both fail, the task's own solution stays. Tasks of the split test are left out. A run that was cut off goes
    on where it was.

    \b
    flabc data customise tasks.jsonl --model pruned --teacher smollm2-135m -o custom.jsonl --allow-code-execution
    flabc recover pruned --data custom.jsonl -o recovered
    """
    from flabc import customising
    from flabc.frozen import fitting
    from flabc.runtime.evaluate.task import EvalOptions

    parsed = fitting(EvalOptions, options)
    found = customising.customise(tasks, model, teacher, output, parsed, force=force)
    emit(as_json, found, lambda: _show_customised(found))


def _show_customised(found: Customised) -> None:
    for step, count in found.model_dump(exclude={"path"}).items():
        click.echo(f"{step:<10} {count:>8,}")
    click.echo(f"wrote {found.path}", err=True)


def _show(found: Mined) -> None:
    for step, count in found.counts.model_dump().items():
        click.echo(f"{step:<10} {count:>8,}")
    tallies = found.model_dump(include={"dropped", "tested_by", "needs", "splits", "licences"})
    for kind, counts in tallies.items():
        click.echo(
            f"{kind.replace('_', ' ')}: {', '.join(f'{name} {count:,}' for name, count in counts.items()) or 'none'}",
            err=True,
        )
    click.echo(f"wrote {found.path}", err=True)
