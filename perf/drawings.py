"""Drawings as files of their own, in fixed colours: what the drawings of the pages are not. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def write_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    file: Path,
    x: str,
    y: str,
    level: tuple[str, float] | None = None,
) -> None:
    """Draw curves over each other, as SVG; the axis upwards begins at nought.

    Args:
        curves: by what the legend calls them, points (x, y).
        file: the drawing.
        x: what the axis to the right shows, with its unit.
        y: what the axis upwards shows.
        level: what the curves are compared with: a name and a line across. Without it that is the first curve.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    with drawing(file, 4.4, 2.8) as figure:
        axes = figure.subplots()
        for at, (name, points) in enumerate(curves.items(), -1 if level is None else 0):
            colour = COLOURS[0] if at < 0 else f"C{at}"  # matplotlib's own, which begin with our blue
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker="o", markersize=3, label=name)
        if level is not None:
            axes.axhline(level[1], color=COLOURS[0], linestyle="--", linewidth=1, label=level[0])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
