"""The drawings of the GPU suite: throughput, energy and memory by batch, dense and pruned. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flabc.runtime.measure.shape_result import ShapeFigures, ShapeResult

from .drawings import COLOURS, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: What is drawn: file, axis, and where both sides' figures are.
Values = Callable[[ShapeFigures], Sequence[float | None]]
DRAWN: dict[str, tuple[str, Values]] = {
    "throughput": ("tokens/s, all sequences", lambda found: found.tokens_per_s),
    "energy": ("J per token, above idle", lambda found: found.joules_per_token),
    "memory": ("peak device memory, MiB", lambda found: (None, None) if found.extrapolated else found.peak_mib),
}


def write_drawings(results: Sequence[ShapeResult], folder: Path) -> list[Path]:
    """A file for each quantity of which anything was measured: a row of axes, one for each pair and prompt length.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    return [file for name in DRAWN if (file := _write(name, results, folder)) is not None]


def curves(name: str, results: Sequence[ShapeResult]) -> dict[str, list[tuple[int, float, float]]]:
    """(batch, dense, pruned) of each pair and prompt length, by its title; what was not measured is left out."""
    found: dict[str, list[tuple[int, float, float]]] = {}
    for result in results:
        figures = result.figures()
        dense, pruned = DRAWN[name][1](figures)
        if dense is None or pruned is None:
            continue
        label = ", extrapolated" if figures.extrapolated else ""
        title = f"{result.shape}\n{result.cut}, prompt {result.workload.prompt_tokens}{label}"
        found.setdefault(title, []).append((result.workload.batch, dense, pruned))
    return {title: sorted(points) for title, points in found.items()}


def _write(name: str, results: Sequence[ShapeResult], folder: Path) -> Path | None:
    found = curves(name, results)
    if not found:
        return None
    file = folder / f"{name}.svg"
    with drawing(file, 3.2 * len(found), 2.6) as figure:
        for axes, (title, points) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
            _draw(axes, title, points)
        figure.axes[0].set_ylabel(DRAWN[name][0])
        figure.axes[0].legend(frameon=False)
    return file


def _draw(axes: Axes, title: str, points: Sequence[tuple[int, float, float]]) -> None:
    batches = [point[0] for point in points]
    for at, (side, colour) in enumerate(zip(("dense", "pruned"), COLOURS, strict=True), 1):
        axes.plot(batches, [point[at] for point in points], color=colour, marker="o", markersize=3, label=side)
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(0, 1.1 * max(max(point[1:]) for point in points))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("batch")
    axes.set_title(title)
