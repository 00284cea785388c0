"""``flabc compress``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .parameters import FORCE, TIE, Size, emit, json_option

if TYPE_CHECKING:
    from flabc.api import Compressed


@click.command()
@click.argument("model", required=False)
@click.option("--recipe", help="A shipped recipe or a YAML file.  [default: flab-22]")
@click.option("-o", "--output", type=click.Path(), help="The checkpoint folder to write.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change the recipe; repeatable.")
@click.option("--dry-run", is_flag=True, help="Plan and measure every cut, train and write nothing.")
@click.option("--device", default="cpu", show_default=True, help="A torch device.")
@click.option("--seed", type=int, help="Picks the calibration text.  [default: 0]")
@click.option("--memory", type=Size(), help="Memory that may be used, e.g. 6GiB.  [default: what is free]")
@click.option("--allow-pickle", is_flag=True, help="Read weights that are only there as pickles (.bin).")
@TIE
@FORCE
@json_option
def compress(
    model: str | None,
    recipe: str | None,
    output: str | None,
    overrides: Sequence[str],
    dry_run: bool,
    device: str,
    seed: int | None,
    memory: int | None,
    allow_pickle: bool,
    tie: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Cut MODEL by a recipe and write a checkpoint that plain transformers loads.

    Beside a flabc.yaml no argument is needed.

    \b
    flabc compress smollm2-135m --recipe flab-22 -o pruned
    flabc compress smollm2-135m -o pruned --set target.params=0.7 --set stages.widths.score=wanda
    """
    from flabc import api
    from flabc.project import Project, find, settle

    model = settle(model, "model", "MODEL")
    output = None if dry_run else settle(output, "checkpoint", "output folder (-o)")
    project = find() or Project(model=model)
    done = api.compress(
        model,
        recipe or project.recipe,
        output,
        overrides=overrides,
        device=device,
        seed=project.seed if seed is None else seed,
        tie=tie,
        memory=memory,
        allow_pickle=allow_pickle,
        force=force,
    )
    emit(as_json, done, lambda: _show_compressed(done))


def _show_compressed(done: Compressed) -> None:
    bits = done.quality["heldout_bits_per_byte"]
    click.echo(
        f"{done.dense.num_parameters / 1e6:.1f} M → {done.spec.num_parameters / 1e6:.1f} M parameters "
        f"({done.kept - 1:+.1%}); held-out bits per byte {bits['dense']:.3f} → {bits['pruned']:.3f}"
    )
    if done.peak_device_mib is not None:
        click.echo(f"at most {done.peak_device_mib:.0f} MiB of the GPU's memory in use")
    click.echo(f"wrote {done.path}" if done.path else "dry run: nothing written")
