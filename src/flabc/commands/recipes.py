"""``flabc recipes``."""

from __future__ import annotations

import json

import click

from .parameters import emit, json_option


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes.")
@json_option
def recipes(name: str | None, schema: bool, as_json: bool) -> None:
    """List the shipped recipes, or show the one called NAME.

    \b
    flabc recipes
    flabc recipes flab-22 > mine.yaml
    """
    from flabc import recipe

    if schema:
        click.echo(json.dumps(recipe.Recipe.model_json_schema(), indent=2))
        return
    if name is not None:
        loaded = recipe.load(name)
        text = recipe.find(name).read_text(encoding="utf-8")
        emit(as_json, loaded, lambda: click.echo(text, nl=False))
        return
    known = [recipe.load(each) for each in recipe.shipped()]
    data = [{"name": each.name, "description": each.description} for each in known]

    def show() -> None:
        for each in known:
            click.echo(f"{each.name:<12} {each.description}")

    emit(as_json, {"recipes": data}, show)
