"""The model card of a checkpoint: a README for people and hubs, and a picture of what is left of each layer."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from flabc.families import Part
from flabc.families.per_layer import MODELING
from flabc.spec import ModelSpec

#: Width of a layer's bar, height of the tallest, and room for the words, in the picture's units.
BAR, TALL, MARGIN = 18, 140, 34

#: Attention and FFN, before and after.
COLOURS = {Part.ATTENTION: ("#d6e4f0", "#2c6e9b"), Part.FFN: ("#f3e0cd", "#c4762b")}


def write(
    folder: Path,
    before: ModelSpec,
    after: ModelSpec,
    *,
    origin: Sequence[int],
    source: str,
    recipe: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    quality: Mapping[str, float] | None,
) -> None:
    """Write ``README.md`` and ``shape.svg``.

    Args:
        folder: where to; the checkpoint lies there already.
        before: the dense model.
        after: the cut model.
        origin: which layer of the dense model each layer was.
        source: the dense model's name.
        recipe: as it was run.
        stages: the receipt of each.
        quality: bits per byte of held-out text, ``dense`` and ``pruned``, if it was measured.
    """
    facts = {"before": before, "after": after, "source": Path(source).name, "recipe": recipe, "stages": stages}
    card = _render(
        "card.md.jinja",
        **facts,
        quality=quality,
        own_module=(folder / MODELING).is_file(),
        version=metadata.version("flabc"),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "shape.svg").write_text(_render("shape.svg.jinja", **_picture(before, after, origin)), encoding="utf-8")


def go_on(made: Path, folder: Path, training: Mapping[str, Any]) -> None:
    """Carry a card on to a checkpoint that was trained, and say how.

    Args:
        made: the folder of the checkpoint before; without a card nothing is written.
        folder: where to.
        training: the receipt of the training.
    """
    if not (made / "README.md").is_file():
        return
    facts = dict(training) | {"teacher": training["teacher"] and Path(training["teacher"]).name}
    card = (made / "README.md").read_text(encoding="utf-8").rstrip("\n")
    (folder / "README.md").write_text(f"{card}\n{_render('training.md.jinja', **facts)}", encoding="utf-8")
    if (made / "shape.svg").is_file():
        shutil.copyfile(made / "shape.svg", folder / "shape.svg")


def _picture(before: ModelSpec, after: ModelSpec, origin: Sequence[int]) -> dict[str, Any]:
    """Bars for every layer of the dense model, what is left drawn over what was there."""
    dense, cut = before.layer_parameters(), dict(zip(origin, after.layer_parameters(), strict=True))
    scale = TALL / max(sum(layer.values()) for layer in dense)
    floor, bars = TALL + 12, list[dict[str, Any]]()
    for index, layer in enumerate(dense):
        left = cut.get(index, dict.fromkeys(Part, 0))
        top = float(floor)
        for part, (pale, full) in COLOURS.items():
            was, now = layer[part] * scale, left[part] * scale
            place = {"x": MARGIN + index * BAR, "width": BAR - 4}
            bars.append(place | {"y": round(top - was, 1), "height": round(was, 1), "fill": pale})
            bars.append(place | {"y": round(top - now, 1), "height": round(now, 1), "fill": full})
            top -= was
    step = max(1, len(dense) // 12)
    labels = [
        {"x": MARGIN + index * BAR + BAR / 2 - 2, "y": floor + 14, "anchor": "middle", "text": index}
        for index in range(0, len(dense), step)
    ]
    words = "parameters per layer: attention (blue), FFN (orange); pale is gone"
    labels.append({"x": MARGIN, "y": floor + 30, "anchor": "start", "text": words})
    width = max(2 * MARGIN + len(dense) * BAR, 420)
    return {"bars": bars, "labels": labels, "width": width, "height": floor + 38}


def _render(template: str, **facts: Any) -> str:
    import jinja2

    text = resources.files("flabc.compress").joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(text).render(**facts)
