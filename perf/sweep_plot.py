"""The drawing of a sweep: what is left of the model against what it says differently. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .drawings import COLOURS, drawing


def write_curves(curves: Mapping[str, Sequence[tuple[float, float]]], file: Path) -> None:
    """Draw a curve for each way of finding rates, as SVG.

    Args:
        curves: by name, (parameters, KL to the dense model on held-out text in nats per token).
        file: the drawing.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    with drawing(file, 4.4, 2.8) as figure:
        axes = figure.subplots()
        for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
            sizes, costs = zip(*sorted(points), strict=True)
            axes.plot([size / 1e6 for size in sizes], costs, color=colour, marker="o", markersize=3, label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("parameters left, millions")
        axes.set_ylabel("KL on held-out text, nats per token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
