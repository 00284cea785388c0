"""The table of searches: every row lands on the budget, is measured on the model that it makes, and made once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from flabc.errors import StageError
from flabc.perf import search_study
from flabc.perf.making import Maker
from flabc.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def test_searches_land_on_the_budget_and_are_made_once(
    tiny: Callable[[str], Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "CALIBRATION": {"corpus": str(texts), "sequences": 4, "sequence_length": 32},
        "RESULTS": tmp_path,
        "EVALUATIONS": 12,
        "SEQUENCES": (1, 2),
        "MULTIPLE": 4,
        "DTYPE": "float32",
    }.items():
        monkeypatch.setattr(search_study, name, value)
    made, make = list[str](), Maker.make

    def counted(maker: Maker, recipe: Recipe, folder: Path) -> dict[str, Any]:
        made.append(recipe.name)
        return make(maker, recipe, folder)

    monkeypatch.setattr(Maker, "make", counted)
    model, work = str(tiny("qwen2-tied")), str(tmp_path / "work")
    rows = ["uniform", "evolution", "llm", "depth"]
    asked = ["search_study.py", model, "--name", "tiny", "--work", work, "--sizes", "30", "--rows", *rows]
    monkeypatch.setattr(sys, "argv", [*asked, "--seeds", "0", "1"])
    search_study.main()
    cells = json.loads((tmp_path / "tiny.search.json").read_text())["cells"]
    assert list(cells) == ["dense", *(f"30/{row}/{seed}" for seed in (0, 1) for row in rows)]
    dense = AutoModelForCausalLM.from_pretrained(model)
    inside = sum(each.numel() for name, each in dense.named_parameters() if "layers" in name and "norm" not in name)
    total = sum(each.numel() for each in dense.parameters())
    for key, cell in cells.items():
        if key != "dense":
            assert cell["parameters"] <= total - 0.3 * inside + 1
            assert cell["kl"]["target"]["value"] > 0
            assert cell["evaluations"] <= 12
            assert cell["perplexity"]["baseline"] == cells["dense"]["perplexity"]["target"]
    assert cells["30/llm/0"]["asked"] > 0
    assert all(cell["search_seconds"] > 0 for key, cell in cells.items() if key != "dense")
    depth = cells["30/depth/0"]["recipe"]["stages"][0]["rates"]
    assert {rate for rates in depth.values() for rate in rates} == {0.0, 1.0}
    table = search_study.as_markdown(cells).splitlines()
    assert [line.split(" | ")[:3] for line in table[2:]] == [["| 70%", search_study.ROWS[row][0], "2"] for row in rows]

    assert cells["30/uniform/0"]["kl"] == cells["30/uniform/1"]["kl"]
    found = {json.dumps(cell["recipe"]["stages"]) for key, cell in cells.items() if key != "dense"}
    assert len(made) == len(found) < 8  # the even rate is cut once for both seeds

    monkeypatch.setattr(search_study, "search", None)  # nothing is searched again
    search_study.main()
    assert json.loads((tmp_path / "tiny.search.json").read_text())["cells"] == cells


def test_a_search_that_fails_is_told(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StageError("It cannot be.")

    study = search_study.Study(tmp_path / "result.json", tmp_path, str(tiny("qwen2-tied")))
    monkeypatch.setattr(search_study, "search", fail)
    study.fill("30", "uniform", 0)
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert cells == {"30/uniform/0": {"error": "It cannot be."}}
    assert search_study.as_markdown(cells).splitlines()[2] == "| 70% | uniform | 0 | failed | - | - | - | - | - |"
