"""``flabc eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .parameters import AT_LEAST_ONE, CORPUS, FORCE, TIE, emit, json_option

if TYPE_CHECKING:
    from flabc.api import Diff


@click.command("eval")
@click.argument("target", required=False)
@click.option(
    "--task",
    default="perplexity",
    show_default=True,
    help="perplexity, kl, humaneval, mbpp, evoeval, crux, crux-input, output-prediction, mined[:dev], "
    "robustness[:KIND,...] or lm-eval:TASK,...",
)
@click.option("--baseline", help="The model to compare with, asked in the same way.")
@click.option("-o", "--output", type=click.Path(), help="The report folder to write; a run cut off goes on there.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="The task's file; for lm-eval a folder.")
@CORPUS
@click.option("--chat", is_flag=True, help="Ask through the chat template instead of letting the model go on.")
@click.option("--samples", type=AT_LEAST_ONE, default=1, show_default=True, help="Answers per problem, for pass@k.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-p", default=1.0, show_default=True, help="Sample from this much probability.")
@click.option("--max-tokens", type=AT_LEAST_ONE, default=300, show_default=True, help="Tokens of an answer at most.")
@click.option("--limit", type=AT_LEAST_ONE, help="The first so many problems or documents only.")
@click.option("--batch", type=AT_LEAST_ONE, default=64, show_default=True, help="Sequences, or requests, at once.")
@click.option("--threads", type=AT_LEAST_ONE, help="Threads for the computation.")
@click.option("--dtype", default="float32", show_default=True, help="What torch computes in: float32 or bfloat16.")
@click.option("--timeout", "timeout_s", default=10.0, show_default=True, help="Seconds that a program may take.")
@click.option("--seed", default=0, show_default=True, help="Makes sampling repeatable.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="For lm-eval over a server: a folder.")
@click.option("--allow-code-execution", is_flag=True, help="Let code that the model wrote run, in a sandbox.")
@click.option("--diff", nargs=2, type=click.Path(exists=True), help="Two report folders: problems gained and lost.")
@TIE
@FORCE
@json_option
def evaluate(
    target: str | None,
    baseline: str | None,
    output: str | None,
    diff: tuple[str, str] | None,
    tie: bool,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure the quality of TARGET, alone or beside a baseline, through what will serve it.

    TARGET is an engine, a checkpoint, a model, or the URL of an OpenAI-compatible server (key in OPENAI_API_KEY).

    \b
    flabc eval engine --task perplexity
    flabc eval engine --baseline dense-engine --task humaneval --allow-code-execution -o quality
    flabc eval http://localhost:8000 --task lm-eval:arc_easy --tokenizer engine
    flabc eval --diff quality-monday quality-friday
    """
    from flabc import api
    from flabc.frozen import fitting
    from flabc.project import settle
    from flabc.runtime.evaluate.task import EvalOptions

    if diff is not None:
        changes = api.diff(*diff)
        emit(as_json, changes, lambda: _show_diff(changes))
        return
    parsed = fitting(EvalOptions, options)
    model = settle(target, "engine", "TARGET")
    result = api.evaluate(model, parsed, baseline=baseline, output=output, tie=tie, force=force)

    def show() -> None:
        from flabc.perf import evaluation

        click.echo(evaluation.table(result.rows))
        for missing in result.unprotected:
            click.echo(f"sandbox: {missing}", err=True)
        if output is not None:
            click.echo(f"report: {Path(output).absolute() / evaluation.HTML}")

    emit(as_json, result, show)


def _show_diff(changes: Diff) -> None:
    click.echo(f"{changes.task}, {changes.compared} problems: {changes.before} → {changes.after}")
    for sign, names in (("+", changes.gained), ("-", changes.lost)):
        for name in names:
            click.echo(f"{sign} {name}")
    click.echo(f"{len(changes.gained)} gained, {len(changes.lost)} lost")
