"""Recipes: what is to be done to a model, as data. Flags say how; a result carries the recipe that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from flabc.compress.config import Calibration, StageConfig, Target, check_stage_name
from flabc.errors import RecipeError, UnknownNameError
from flabc.frozen import Frozen, read_yaml, validated

#: Where the shipped recipes lie.
SHIPPED = Path(__file__).parent / "recipes"


class Recipe(Frozen):
    """A recipe, validated.

    ``flabc recipes`` lists those that are shipped; ``flabc recipes --schema`` prints this model's JSON schema.
    """

    name: str = Field(description="What the recipe is called.")
    description: str = Field("", description="What it does, in a sentence.")
    target: Target | None = Field(None, description="What is to be left of the model.")
    calibration: Calibration = Field(default_factory=lambda: Calibration.model_validate({}))
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="What to cut, in order.")


def shipped() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def load(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a shipped recipe by name, or a file, with overrides applied.

    Args:
        name: a shipped name, or the path of a YAML file.
        overrides: ``path=value`` each, e.g. ``target.params=0.7`` or ``stages.0.coverage=0.999``; a stage can also
            be named: ``stages.widths.score=wanda``.

    Raises:
        UnknownNameError: for an unknown recipe or stage.
        RecipeError: if the file is not YAML, or does not validate; a misspelt criterion or score gets a guess.
    """
    file = find(name)
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise RecipeError(f"{file} is not a recipe.", expected="a mapping with 'name' and 'stages'")
    for override in overrides:
        _override(content, override)
    return parse(content, str(name))


def parse(content: Mapping[str, Any], origin: str) -> Recipe:
    """Validate a recipe.

    Raises:
        UnknownNameError: for an unknown stage.
        RecipeError: naming every field that is wrong.
    """
    stages = content.get("stages")
    for entry in stages if isinstance(stages, list) else ():
        check_stage_name(entry)
    recipe = validated(Recipe, content, f"The recipe {origin}")
    open_ended = [stage.stage for stage in recipe.stages if stage.takes_the_rest]
    if open_ended and recipe.target is None:
        raise RecipeError(
            f"The recipe {origin} has a {open_ended[0]} stage that does not say how much to remove, and no 'target'.",
            fix="Give it one of the two.",
        )
    return recipe


def find(name: str | Path) -> Path:
    """The file of a shipped recipe or of a path.

    Raises:
        UnknownNameError: if it is neither.
    """
    known = shipped()
    if str(name) in known:
        return known[str(name)]
    if Path(name).is_file():
        return Path(name)
    raise UnknownNameError("recipe", str(name), known)


def _override(content: dict[str, Any], override: str) -> None:
    """Set one value in place.

    Raises:
        RecipeError: if the override is not ``path=value`` or the path leads nowhere.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"Cannot read the override {override!r}.", expected="path=value, e.g. target.params=0.7")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"The value of the override {override!r} is no YAML.",
            expected="a number, a word, or [a, list]",
            found=text,
            fix=f"Quote it: '{path}=\"{text}\"'.",
        ) from error
    place: Any = content
    for key in keys[:-1]:
        step = key if isinstance(place, dict) else _position(place, key, override)
        if isinstance(place, dict):
            place.setdefault(step, {})
        place = place[step]
    if isinstance(place, list):
        place[_position(place, keys[-1], override)] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    else:
        raise RecipeError(f"The override {override!r} goes through a value that has no parts.", found=repr(place))


def _position(places: Any, key: str, override: str) -> int:
    """Where ``key`` leads in a list: a number, or the name of a stage."""
    names = (
        [entry.get("stage") if isinstance(entry, dict) else None for entry in places]
        if isinstance(places, list)
        else []
    )
    if key.isdigit() and int(key) < len(names):
        return int(key)
    if names.count(key) > 1:
        places = ", ".join(f"stages.{at}" for at, name in enumerate(names) if name == key)
        raise RecipeError(f"The override {override!r} may mean several {key} stages.", expected=places)
    if key in names:
        return names.index(key)
    raise RecipeError(f"The override {override!r} leads nowhere: there is no {key!r}.", found=f"stages {names}")
