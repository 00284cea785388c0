"""A sweep: a search for each of several targets, the largest first; evolution goes on from the rates found before."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from flabc import artifact
from flabc.errors import UsageError, require
from flabc.frozen import Frozen
from flabc.perf.drawings import write_curves
from flabc.recipe import Recipe, parse
from flabc.recipe import load as load_recipe
from flabc.searching import RECIPE, Options, Searched, Shared, search

#: The files of an output folder, beside a search's folder for each target.
TABLE, DRAWING = "sweep.csv", "sweep.svg"


class Point(Frozen):
    """What was found for one target: parameters of the model, KL to the dense one in nats per token, and the same of
    the even rate; ``recipe`` is where the rates are, below the sweep's folder; with a table of latencies, what a step
    of both takes by it.
    """

    target: float
    parameters: int
    kl: float
    heldout_kl: float
    uniform_kl: float
    uniform_heldout_kl: float
    evaluations: int
    recipe: str
    milliseconds: float | None = None
    uniform_milliseconds: float | None = None


class Swept(Frozen):
    """What a sweep found, the largest model first."""

    path: Path
    operator: str
    points: tuple[Point, ...]


def sweep(
    model: str,
    recipe: str | Path | Recipe,
    output: str | Path,
    targets: Sequence[float],
    options: Options | None = None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
) -> Swept:
    """Search for each target, and write a table and a drawing of what size, or a step's time, costs.

    Args:
        model: see ``search``.
        recipe: see ``search``.
        output: the folder to write: a folder of a search for each target, ``sweep.csv`` and ``sweep.svg``.
        targets: fractions of the parameters to keep, or of a step's time.
        options: how, for each target.
        overrides: changes to the recipe, ``path=value`` each.
        device: a torch device.
        seed: of every search.
        resume: go on with a sweep that was cut off.
        force: replace what is there.

    Raises:
        UsageError: if there is no target, or one that is no fraction.
        FlabcError: see ``search``; what was evaluated is in the journals.
    """
    if not targets or not all(0 < target < 1 for target in targets):
        raise UsageError("A sweep needs targets.", expected="fractions between 0 and 1", found=f"{list(targets)}")
    require("matplotlib", "report")
    out, options = Path(output), options or Options()
    artifact.check_free(out, force=force or resume)
    start = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    points, shared = list[Point](), Shared()
    for target in sorted(set(targets), reverse=True):
        at = out / str(target)
        found = search(
            model,
            start,
            at,
            options,
            target=target,
            device=device,
            seed=seed,
            resume=resume,
            force=force or resume,
            shared=shared,
        )
        points.append(_point(found, target, out))
        start = parse(found.recipe, str(at / RECIPE))  # a smaller model begins where a larger one ended
    done = Swept(path=out, operator=options.operator, points=tuple(points))
    _write(done)
    return done


def _point(found: Searched, target: float, out: Path) -> Point:
    return Point(
        target=target,
        parameters=found.best.parameters,
        kl=found.best.kl,
        heldout_kl=found.best.heldout_kl,
        uniform_kl=found.uniform.kl,
        uniform_heldout_kl=found.uniform.heldout_kl,
        evaluations=found.evaluations,
        recipe=str((found.path / RECIPE).relative_to(out)),
        milliseconds=found.best.milliseconds,
        uniform_milliseconds=found.uniform.milliseconds,
    )


def _write(done: Swept) -> None:
    text = io.StringIO()
    rows = [point.model_dump(exclude_none=True) for point in done.points]
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    artifact.write_whole(done.path / TABLE, text.getvalue())
    points = done.points
    curves = {"uniform": [(_size(p.parameters, p.uniform_milliseconds), p.uniform_heldout_kl) for p in points]}
    if done.operator != "uniform":
        curves[done.operator] = [(_size(p.parameters, p.milliseconds), p.heldout_kl) for p in points]
    timed = points[0].milliseconds is not None
    size = "milliseconds of a step, by the table of latencies" if timed else "parameters left, millions"
    write_curves(curves, done.path / DRAWING, size, "KL on held-out text, nats per token")


def _size(parameters: int, milliseconds: float | None) -> float:
    """What the budget is counted in: milliseconds where there is a table of latencies, or millions of parameters."""
    return parameters / 1e6 if milliseconds is None else milliseconds
