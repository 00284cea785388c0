"""The flags of ``flabc export`` that say how TensorRT builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .parameters import AT_LEAST_ONE

if TYPE_CHECKING:
    from flabc.export.tensorrt_plan import BuildOptions

F = TypeVar("F", bound=Callable[..., Any])


_FLAGS = (
    click.option("--max-batch", type=AT_LEAST_ONE, help="TensorRT: sequences at once.  [default: 8]"),
    click.option("--max-input", type=AT_LEAST_ONE, help="TensorRT: tokens of a prompt read at once.  [default: 512]"),
    click.option(
        "--max-length",
        type=AT_LEAST_ONE,
        help="TensorRT: room for prompt and answer, a multiple of 64.  [default: the model's positions, at most 2048]",
    ),
    click.option(
        "--timing-cache",
        type=click.Path(dir_okay=False, resolve_path=True),
        help="TensorRT: a file of kernel timings, used and extended.",
    ),
    click.option("--version-compatible", is_flag=True, default=None, help="TensorRT: later versions load it too."),
    click.option("--hardware-compatible", is_flag=True, default=None, help="TensorRT: any GPU from Ampere on runs it."),
    click.option("--strip-weights", is_flag=True, default=None, help="TensorRT: leave weights in the ONNX file."),
)


#: The names of their values.
NAMES = (
    "max_batch",
    "max_input",
    "max_length",
    "timing_cache",
    "version_compatible",
    "hardware_compatible",
    "strip_weights",
)


def build_flags(command: F) -> F:
    """Add the flags; the command gets them as keyword arguments of the same names."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def take_build_options(arguments: dict[str, Any]) -> BuildOptions | None:
    """What was asked for, taken out of a command's arguments; None if nothing was.

    Raises:
        UsageError: if a value does not fit.
    """
    given = {name: arguments.pop(name) for name in NAMES}
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return None
    from flabc.export.tensorrt_plan import BuildOptions
    from flabc.frozen import fitting

    return fitting(BuildOptions, asked)
