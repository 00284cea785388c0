"""``flabc gate``: judge an engine, measure the noise, make a baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flabc.errors import EngineError, FlabcError, UsageError

from .parameters import CORPUS, FORCE, Group, emit, json_option

if TYPE_CHECKING:
    from flabc.gating import Gated, Noise

#: Exit codes: what a CI job sees of a verdict.
EXIT = {"pass": 0, "fail": 1, "undecided": 3}

GATES = click.option(
    "--gates",
    "config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="The limits, a YAML file.",
)


@click.group(cls=Group)
def gate() -> None:
    """Fail CI when an engine has become slower, larger or worse, and only then.

    \b
    flabc gate run --candidate engine --against main-engine --gates gates.yaml -o verdict
    flabc gate noise engine --gates gates.yaml
    flabc gate baseline engine --gates gates.yaml -o baseline.json
    """


@gate.command()
@click.option("--candidate", required=True, type=click.Path(path_type=Path), help="The engine in question.")
@click.option(
    "--against",
    required=True,
    type=click.Path(path_type=Path),
    help="An engine, measured now in turns; or a baseline's JSON, compared by what the machine could do, or a folder "
    "with one for each class of machine.",
)
@GATES
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for JSON, JUnit XML and Markdown.")
@CORPUS
@click.option("--allow-code-execution", is_flag=True, help="Let code that the model wrote run, in a sandbox.")
@FORCE
@json_option
@click.pass_context
def run(
    context: click.Context,
    candidate: Path,
    against: Path,
    config: Path,
    output: Path | None,
    corpus: str,
    allow_code_execution: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Judge an engine. Exit code 0: within all limits; 1: over one; 2: the call, the gates file or a folder is wrong;
    3: could not be decided or measured.

    Both engines are opened and measured again and again until every speed is surely on one side of its limit, or the
    gates' budget ends. Pairs of runs during which others use the machine do not count.

    \b
    flabc gate run --candidate engine --against main-engine --gates gates.yaml -o verdict
    flabc gate run --candidate engine --against perf/baseline --gates gates.yaml
    """
    from flabc import gating

    with _no_verdict():
        found = gating.run(
            candidate,
            against,
            config=config,
            output=output,
            corpus=corpus,
            allow_code_execution=allow_code_execution,
            force=force,
        )
    emit(as_json, found, lambda: _show(found))
    context.exit(EXIT[found.verdict])


@gate.command()
@click.argument("engine", type=click.Path(path_type=Path))
@GATES
@CORPUS
@json_option
@click.pass_context
def noise(context: click.Context, engine: Path, config: Path, corpus: str, as_json: bool) -> None:
    """Measure ENGINE against itself: limits below this machine's noise are refused, with exit code 3.

    \b
    flabc gate noise engine --gates gates.yaml
    """
    from flabc import gating

    with _no_verdict():
        found = gating.noise(engine, config=config, corpus=corpus)
    emit(as_json, found, lambda: _show_noise(found))
    context.exit(EXIT["undecided"] if found.too_tight else EXIT["pass"])


@gate.command()
@click.argument("engine", type=click.Path(path_type=Path))
@GATES
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The .json file to commit, or a folder for one engine's baselines: one for each class of machine.",
)
@CORPUS
@FORCE
@json_option
def baseline(engine: Path, config: Path, output: Path, corpus: str, force: bool, as_json: bool) -> None:
    """Measure ENGINE in multiples of what this machine can do at best, to compare with later.

    \b
    flabc gate baseline engine --gates gates.yaml -o perf/baseline
    flabc gate baseline engine --gates gates.yaml -o engine-on-this-runner.json
    """
    from flabc import gating

    with _no_verdict():
        made = gating.baseline(engine, output, config=config, corpus=corpus, force=force)
    emit(
        as_json,
        made,
        lambda: click.echo(f"{gating.baseline_file(output)}: {len(made.openings)} openings on {made.machine_class}"),
    )


@contextmanager
def _no_verdict() -> Iterator[None]:
    """Exit codes of errors: 1 is for an engine that was judged."""
    try:
        yield
    except FlabcError as error:
        error.exit_code = EXIT["undecided"] if isinstance(error, EngineError) else UsageError.exit_code
        raise
    except Exception as error:
        error.exit_code = EXIT["undecided"]  # type: ignore[attr-defined]
        raise


def _show(found: Gated) -> None:
    from flabc.perf.verdict_files import as_markdown

    click.echo(as_markdown(found.checks), nl=False)
    beside = f", {found.disturbed} more beside others' work did not count" if found.disturbed else ""
    counted = f"{found.pairs} pairs of runs in {found.openings} openings, {found.seconds:.0f} s"
    click.echo(f"{counted}{beside}", err=True)
    if found.path is not None:
        click.echo(f"report: {found.path.absolute()}", err=True)


def _show_noise(found: Noise) -> None:
    for name, rise in found.rises.items():
        sign = "TOO TIGHT" if name in found.too_tight else "ok"
        click.echo(f"{name:<10} noise {rise:6.1%}  limit {found.limits[name]:6.1%}  {sign}")
    counted = f"{found.pairs} pairs of runs in {found.openings} openings"
    click.echo(f"{counted}, {found.disturbed} more beside others' work did not count", err=True)
