"""Drawings as files of their own, in fixed colours: what the drawings of the pages are not. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flabc.errors import require

#: What is compared with, and what is compared.
COLOURS = ("#8a8f98", "#1f77b4")


@contextmanager
def drawing(file: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure, which is written as SVG at the end, the same for the same content; sizes are in inches.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    style = {"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "flabc"}
    with require("matplotlib", "report").rc_context(style):
        figure = require("matplotlib.figure", "report").Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(file, format="svg", metadata={"Date": None})
