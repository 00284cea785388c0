"""Kinds of parameters, options that several commands have, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from math import inf
from typing import Any, TypeVar

import click

from flabc.errors import UnknownNameError

F = TypeVar("F", bound=Callable[..., Any])

AT_LEAST_ONE = click.IntRange(1)

FORCE = click.option("--force", is_flag=True, help="Replace an output folder that is not empty.")
TIE = click.option("--tie", is_flag=True, help="Tie input and output matrices that a GGUF stores twice.")
CORPUS = click.option(
    "--corpus",
    default="python-stdlib",
    show_default=True,
    help="A built-in corpus, or a file or folder of text.",
)


class Group(click.Group):
    """A group that answers an unknown command with the nearest one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which was probably meant."""
        if args and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(str(UnknownNameError("command", args[0], self.list_commands(ctx))), ctx)
        return super().resolve_command(ctx, args)


class Size(click.ParamType[int]):
    """A number of bytes, as ``6GiB`` or ``500MB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read it, or say how it is written."""
        from pydantic import ByteSize, TypeAdapter, ValidationError

        try:
            return int(TypeAdapter(ByteSize).validate_python(value))
        except ValidationError:
            self.fail(f"{value!r} is no size; expected a number and a unit, e.g. 6GiB or 500MB.", param, ctx)


class Duration(click.ParamType[float]):
    """Seconds, as ``90s``, ``10m`` or ``1h``."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read it, or say how it is written."""
        from flabc.perf.duration import seconds

        try:
            return seconds(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers from one on, apart by commas, as ``1,8``, or a list of them out of a file."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read them, or say how they are written."""
        if not isinstance(value, str):
            return tuple(value)
        parts = value.split(",")
        if not all(part.strip().isdecimal() and int(part) for part in parts):
            self.fail(f"{value!r}: expected whole numbers from 1 on, apart by commas, e.g. 1,8.", param, ctx)
        return tuple(int(part) for part in parts)


class Reals(click.ParamType[tuple[float, ...]]):
    """Numbers above 0, apart by commas, or ``FROM:TO:STEP``, both ends meant; or a list of them out of a file.

    Args:
        below: they are smaller than this.
        example: how they are written.
    """

    name = "numbers"

    def __init__(self, below: float, example: str) -> None:
        self.below, self.example = below, example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read them, or say how they are written."""
        if not isinstance(value, str):
            return tuple(value)
        try:
            if ":" in value:
                first, last, step = (Decimal(part) for part in value.split(":"))
                found = tuple(float(first + step * n) for n in range(int((last - first) / step) + 1))
            else:
                found = tuple(float(part) for part in value.split(","))
        except (ArithmeticError, ValueError):
            found = ()
        if not found or not all(0 < each < self.below for each in found):
            bounds = "above 0" if self.below == inf else f"between 0 and {self.below:g}"
            self.fail(f"{value!r}: expected numbers {bounds}, e.g. {self.example}.", param, ctx)
        return found


#: Shares of something.
FRACTIONS = Reals(1, "0.5:0.9:0.1 or 0.7,0.8")

#: So many of something per second.
RATES = Reals(inf, "0.5,1,2")


def json_option(command: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)


def emit(as_json: bool, data: Any, show: Callable[[], None]) -> None:
    """Print a result: as JSON, or for a person."""
    if not as_json:
        show()
        return
    plain = data.model_dump(mode="json") if hasattr(data, "model_dump") else data
    click.echo(json.dumps(plain, indent=2, ensure_ascii=False))
