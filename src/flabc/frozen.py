"""Frozen: the base of all that is read from a file, given back, or written down, and how it is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from flabc.errors import RecipeError

T = TypeVar("T", bound="Frozen")


class Frozen(BaseModel):
    """Data that does not change and is closed: a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def read_yaml(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        RecipeError: if it is no YAML in UTF-8.
    """
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file} is not valid YAML: {error}") from error


def validated(kind: type[T], content: Any, what: str) -> T:
    """Data as what it should be.

    Args:
        kind: what it should be.
        content: as it was read.
        what: its name, for the error.

    Raises:
        RecipeError: naming every field that is wrong.
    """
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{what} does not validate: {problems(error)}") from error


def problems(error: ValidationError) -> str:
    """A validation error as one paragraph: each field and what is wrong with it."""
    entries = error.errors()
    # A list whose entries are wrong is also reported as too short: only the deepest complaint helps.
    inner = [entry for entry in entries if not any(_inside(other["loc"], entry["loc"]) for other in entries)]
    return "; ".join(
        f"{'.'.join(str(part) for part in entry['loc']) or 'top level'}: {entry['msg'].removeprefix('Value error, ')}"
        for entry in inner
    )


def _inside(deep: tuple[int | str, ...], place: tuple[int | str, ...]) -> bool:
    return len(deep) > len(place) and deep[: len(place)] == place
