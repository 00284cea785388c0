"""Frozen: the base of all that is read from a file, given back, or written down, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from flabc.errors import RecipeError, UnknownNameError, UsageError

T = TypeVar("T", bound="Frozen")
K = TypeVar("K")


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
        raise RecipeError(f"{what} does not validate: {problems(error, kind)}") from error


def fitting(kind: Callable[..., K], options: Mapping[str, Any]) -> K:
    """What a command was told, as the data that it stands for.

    Raises:
        UsageError: naming every option that does not fit.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        raise UsageError(f"These options do not fit: {problems(error)}") from error


def problems(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """A validation error as one paragraph: each field and what is wrong with it, with a guess at a misspelt one.

    Args:
        error: the error.
        kind: what the data should have been, if fields may be misspelt.
    """
    entries = error.errors()
    # A list whose entries are wrong is also reported as too short: only the deepest complaint helps.
    inner = [entry for entry in entries if not any(_inside(other["loc"], entry["loc"]) for other in entries)]
    return "; ".join(f"{'.'.join(map(str, entry['loc'])) or 'top level'}: {_told(entry, kind)}" for entry in inner)


def _told(entry: Any, kind: type[BaseModel] | None) -> str:
    """What is wrong, of one entry of a validation error."""
    if kind is not None and entry["type"] == "extra_forbidden":
        *place, name = entry["loc"]
        return str(UnknownNameError("field", str(name), _fields_at(kind, place)))
    return str(entry["msg"]).removeprefix("Value error, ")


def _fields_at(kind: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The fields that there are at a place inside data; of alternatives, those of the one that the place names."""
    kinds = [kind]
    for part in (part for part in place if isinstance(part, str)):  # a number is a place in a list
        inside = [each.model_fields[part].annotation for each in kinds if part in each.model_fields]
        named = [each for each in kinds if any(field.default == part for field in each.model_fields.values())]
        kinds = [found for annotation in inside for found in _models_in(annotation)] if inside else named or kinds
    return sorted({name for each in kinds for name in each.model_fields})


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The kinds of data that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _inside(deep: tuple[int | str, ...], place: tuple[int | str, ...]) -> bool:
    return len(deep) > len(place) and deep[: len(place)] == place
