"""Models made one after another are what each would be alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flabc.compress import pipeline
from flabc.perf.making import Maker
from flabc.recipe import Recipe, parse


def recipe(texts: Path, *stages: dict[str, Any], keep: float = 0.9) -> Recipe:
    calibration = {"corpus": str(texts), "sequences": 4, "sequence_length": 32}
    return parse({"name": "x", "target": {"params": keep}, "calibration": calibration, "stages": list(stages)}, "x")


def test_a_recipe_that_adds_stages_goes_on_from_the_last(
    tiny: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []
    run_stages = pipeline.run_stages

    def told(model: Any, stages: Any, context: Any) -> Any:
        ran.append([stage.stage for stage in stages])
        return run_stages(model, stages, context)

    monkeypatch.setattr(pipeline, "run_stages", told)
    narrowed = {"stage": "widths", "restore": False, "multiple_of": 8}
    maker = Maker(str(tiny("qwen2-tied")))
    first = maker.make(recipe(texts, narrowed), tmp_path / "first")
    second = maker.make(recipe(texts, narrowed, {"stage": "restore"}), tmp_path / "second")
    smaller = maker.make(recipe(texts, narrowed, {"stage": "restore"}, keep=0.8), tmp_path / "smaller")
    alone = Maker(str(tiny("qwen2-tied"))).make(recipe(texts, narrowed, {"stage": "restore"}), tmp_path / "alone")
    assert ran == [["widths"], ["restore"], ["widths", "restore"], ["widths", "restore"]]
    assert first["parameters"] == second["parameters"] == alone["parameters"] > smaller["parameters"]
    assert second["stages"] == alone["stages"]
    assert second["seconds"] >= first["seconds"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "alone"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    untouched = load_file(tmp_path / "first" / "model.safetensors")
    assert not all(ours[name].equal(untouched[name]) for name in theirs)
