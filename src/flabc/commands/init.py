"""``flabc init``."""

from __future__ import annotations

from pathlib import Path

import click

from .parameters import emit, json_option


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, help="The model that the project is about.")
@click.option("--recipe", default="flab-22", show_default=True, help="A shipped recipe or a YAML file.")
@click.option("--force", is_flag=True, help="Write anew over a flabc.yaml that is there.")
@json_option
def init(model: str, recipe: str, force: bool, as_json: bool) -> None:
    """Write a commented flabc.yaml; beside it the commands need no arguments.

    \b
    flabc init --model smollm2-135m && flabc compress && flabc export && flabc bench
    """
    from flabc import project
    from flabc import recipe as recipes_module

    recipes_module.load(recipe)  # an unknown name is told now, not at the first compress
    file = project.init(Path(), model, recipe, force=force)
    emit(as_json, {"file": str(file)}, lambda: click.echo(f"wrote {file}; next: flabc compress"))
