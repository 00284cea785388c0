"""``flabc search``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .parameters import AT_LEAST_ONE, FORCE, FRACTIONS, Numbers, emit, json_option

if TYPE_CHECKING:
    from flabc.searching import Searched
    from flabc.sweeping import Swept


@click.command()
@click.argument("model", required=False)
@click.option("--recipe", help="A shipped recipe or a YAML file, with one widths stage.  [default: flab-22]")
@click.option(
    "--target",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="The fraction of the parameters to keep, in place of the recipe's; or of a step's time.",
)
@click.option(
    "--sweep",
    "targets",
    type=FRACTIONS,
    help="Several fractions, FROM:TO:STEP or apart by commas: a search for each, a table and a drawing.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option(
    "--operator",
    default="evolution",
    show_default=True,
    help="Who proposes: evolution (EvoPress), llm (Self-Pruner), random, ramp (ATP), global (FLAP) or uniform.",
)
@click.option("--evaluations", type=AT_LEAST_ONE, default=400, show_default=True, help="Candidates at most.")
@click.option("--seed", type=int, help="Makes the search repeatable; picks the calibration text.  [default: 0]")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe; repeatable.")
@click.option("--offspring", type=AT_LEAST_ONE, default=16, show_default=True, help="Candidates of a generation.")
@click.option("--levels", type=click.IntRange(2), default=16, show_default=True, help="Sizes that each place can have.")
@click.option(
    "--sequences",
    type=Numbers(),
    default="2,8",
    show_default=True,
    help="Calibration windows to compare on: all candidates on the first, survivors on more.",
)
@click.option(
    "--top-k",
    type=AT_LEAST_ONE,
    default=64,
    show_default=True,
    help="Compare over the tokens that are somewhere among the dense model's so many likeliest.",
)
@click.option(
    "--latencies",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A table of milliseconds by width, measured where the model will serve: targets are then fractions of time.",
)
@click.option("--sub-blocks", is_flag=True, help="Let attention or FFN of a layer go altogether.")
@click.option("--evaluate-on", multiple=True, help="A corpus to evaluate on, which was not searched on; repeatable.")
@click.option("--llm-url", help="For llm: an OpenAI-compatible endpoint; its key in OPENAI_API_KEY.")
@click.option("--llm-model", help="For llm: the model's name there.")
@click.option("--llm-folder", help="For llm: a model that is run here: an engine, or whatever MODEL can be.")
@click.option(
    "--llm-replay",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="For llm: the transcript.jsonl of a search, in place of an endpoint.",
)
@click.option(
    "--fallback", type=click.Choice(["evolution"]), help="Who goes on when the language model fails for good."
)
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--ray", metavar="ADDRESS", help="Measure by workers over Ray: local, auto, or a cluster's address.")
@click.option("--workers", type=AT_LEAST_ONE, default=2, show_default=True, help="With --ray: how many.")
@click.option("--resume", is_flag=True, help="Go on with the journal in the output folder.")
@FORCE
@json_option
def search(
    model: str | None,
    recipe: str | None,
    target: float | None,
    targets: tuple[float, ...] | None,
    output: Path,
    seed: int | None,
    overrides: Sequence[str],
    device: str,
    resume: bool,
    force: bool,
    as_json: bool,
    latencies: Path | None,
    **options: Any,
) -> None:
    """Find how much each layer of MODEL loses, by trying, and write a recipe that says so.

    Candidates are compared with the dense model by the KL between their token logits, a whole population at once.
    The widths stage's score and kinds count, and whether the recipe refits; rates are what is found. Every evaluation
    is in the journal as soon as it is made: with --resume a search that was cut off comes to the end that it would
    have come to. A recipe that was found is a start for another target.

    \b
    flabc search smollm2-135m --target 0.78 -o searched
    flabc compress smollm2-135m --recipe searched/recipe.yaml -o pruned
    flabc search smollm2-135m --recipe searched/recipe.yaml --target 0.7 --evaluations 100 -o tighter
    flabc search smollm2-135m --sweep 0.5:0.9:0.1 -o swept
    """
    from flabc import searching, sweeping
    from flabc.compress.search.latencies import Latencies
    from flabc.project import Project, find, settle

    if target is not None and targets is not None:
        raise click.UsageError("--target is one fraction, --sweep are several: give one of them.")
    model = settle(model, "model", "MODEL")
    project = find() or Project(model=model)
    shared: dict[str, Any] = {
        "overrides": overrides,
        "device": device,
        "seed": project.seed if seed is None else seed,
        "resume": resume,
        "force": force,
    }
    asked = (model, recipe or project.recipe, output)
    how = searching.Options(**options, latencies=Latencies.read(latencies) if latencies else None)
    if targets is not None:
        swept = sweeping.sweep(*asked, targets, how, **shared)
        emit(as_json, swept, lambda: _show_sweep(swept))
        return
    found = searching.search(*asked, how, target=target, **shared)
    emit(as_json, found, lambda: _show(found))


def _show(found: Searched) -> None:
    click.echo(f"{'':<12} {'parameters':>12} {'KL':>9} {'held-out KL':>12}")
    for row in (found.uniform, found.best) if found.operator != "uniform" else (found.best,):
        size = f"{row.parameters / 1e6:>10.2f} M"
        click.echo(f"{row.name:<12} {size} {row.kl:>9.4f} {row.heldout_kl:>12.4f}{_timed(row.milliseconds)}")
    if found.asked:
        tokens = f"{found.prompt_tokens:,} + {found.completion_tokens:,} tokens"
        click.echo(f"{found.valid} of {found.asked} answers could be used; {tokens}", err=True)
    click.echo(f"{found.evaluations} evaluations; wrote {found.path / 'recipe.yaml'}", err=True)


def _timed(milliseconds: float | None) -> str:
    """A step's time, where a table of latencies tells it."""
    return "" if milliseconds is None else f" {milliseconds:>9.2f} ms"


def _show_sweep(swept: Swept) -> None:
    click.echo(f"{'target':>6} {'parameters':>12} {'held-out KL':>12} {'uniform':>9}")
    for point in swept.points:
        size = f"{point.parameters / 1e6:>10.2f} M"
        timed = _timed(point.milliseconds)
        click.echo(f"{point.target:>6.0%} {size} {point.heldout_kl:>12.4f} {point.uniform_heldout_kl:>9.4f}{timed}")
    click.echo(f"wrote {swept.path / 'sweep.csv'}, sweep.svg, and a recipe for each", err=True)
