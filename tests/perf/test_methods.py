"""The table of pruning methods: what was not measured and what failed are told apart; runs go on where they were."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flabc.compress import pipeline
from flabc.compress.config import Calibration
from flabc.errors import UsageError
from flabc.perf import methods
from flabc.perf.methods import as_markdown
from flabc.runtime.measure.shapes import shape_named


def row(value: float, base: float | None = None, p_value: float | None = None) -> dict[str, object]:
    """A row of an evaluation over 164 units, with what the table reads."""
    baseline = None if base is None else {"value": base}
    pairs = {"baseline": baseline, "p_value": p_value, "gained": 15, "lost": 3}
    return {"target": {"value": value, "n": 164}, **pairs}


def test_a_row_tells_what_was_measured_and_what_was_not() -> None:
    cells = {
        "dense": {"parameters": 494_032_768, "perplexity": [row(4.0)], "humaneval": {"error": "no sandbox"}},
        "all-22/ours": {
            "parameters": 384_849_792,
            "seconds": 623.9,
            "kl": [row(0.0243)],
            "perplexity": [row(5.0, 4.0, 0.5)],
            "humaneval": [row(82 / 164, 70 / 164, 0.18)],
        },
        "blocks-50/flap": {"error": "cannot be reached"},
    }

    lines = as_markdown(cells).splitlines()[2:]

    assert lines == [
        "| all | dense | 494.0 M | - | 4.00 | - | failed |",
        "| 78% of all | flabc | 384.8 M | 0.024 | 5.00 (+25.0%) | 624 | 82/164 (15 gained, 3 lost, p = 0.18) |",
        "| 50% of the layers | FLAP | - | - | cannot be reached | - | - |",
    ]


def test_cells_are_made_once_and_all_methods_listen_to_one_text(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    def counted(*asked: Any) -> pipeline.Text:
        read.append(asked)
        return text_of(*asked)

    text_of = pipeline.text_of
    few = {"corpus": "python-stdlib", "sequences": 4, "sequence_length": 32}
    monkeypatch.setattr(methods, "CALIBRATION", few)
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "tasks", lambda size, **_: ())
    monkeypatch.setattr(pipeline, "text_of", counted)
    asked = [str(tiny("qwen2-tied")), "--name", "tiny", "--work", str(tmp_path / "work"), "--sizes", "blocks-22"]
    monkeypatch.setattr(
        sys, "argv", ["methods.py", *asked, "--methods", "wanda-sp", "ours", "ours-generated", "ours-rows"]
    )
    methods.main()
    assert [calibration.generated for _, calibration, *_ in read] == [False, True]
    cells = json.loads((tmp_path / "tiny.methods.json").read_text())["cells"]
    assert "blocks-22/ours-rows" not in cells  # not one of its sizes
    made = {name: cells[f"blocks-22/{name}"] for name in ("wanda-sp", "ours", "ours-generated")}
    assert made["wanda-sp"]["calibration"] == made["ours"]["calibration"] != made["ours-generated"]["calibration"]
    heard = {name: cell["recipe"]["calibration"]["first_tokens"] for name, cell in made.items()}
    assert heard == {"wanda-sp": 0, "ours": Calibration().first_tokens, "ours-generated": 0}
    dense = cells["dense"]["parameters"]
    assert all(cell["parameters"] < dense for cell in made.values())
    methods.main()
    assert len(read) == 2  # nothing was left to make


def test_what_was_measured_of_a_model_that_is_gone_is_not_said_of_the_next_one(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "CALIBRATION", {"corpus": "python-stdlib", "sequences": 4, "sequence_length": 32})
    table = methods.Table(tmp_path / "tiny.methods.json", tmp_path, str(tiny("qwen2-tied")))
    key, method, wanted = "blocks-22/wanda-sp", methods.METHODS["wanda-sp"], ("perplexity", "kl")
    assert table.make(key, method, "blocks-22", wanted)
    table.cells[key]["perplexity"] = [row(4.0)]
    assert table.make(key, method, "blocks-22", wanted)
    assert "perplexity" in table.cells[key]  # cut off after one of two: the model still lies there
    shutil.rmtree(tmp_path / key)
    assert table.make(key, method, "blocks-22", wanted)
    assert "perplexity" not in table.cells[key]


def test_rows_that_listened_to_another_text_are_no_rivals(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "CALIBRATION", {"corpus": "python-stdlib", "sequences": 4, "sequence_length": 32})
    table = methods.Table(tmp_path / "tiny.methods.json", tmp_path, str(tiny("qwen2-tied")))
    table.make("blocks-22/wanda-sp", methods.METHODS["wanda-sp"], "blocks-22", ("kl",))
    table.cells["blocks-22/wanda-sp"]["calibration"] = "f" * 64
    with pytest.raises(UsageError, match=r"blocks-22/wanda-sp in tiny.methods.json listened to other text.*ffffffff"):
        table.make("blocks-22/ours", methods.METHODS["ours"], "blocks-22", ("kl",))
    assert "blocks-22/ours" not in table.cells
    shutil.rmtree(tmp_path / "blocks-22" / "wanda-sp")
    table.make("blocks-22/wanda-sp", methods.METHODS["wanda-sp"], "blocks-22", ("kl",))  # the row itself, made anew
    assert table.cells["blocks-22/wanda-sp"]["calibration"] != "f" * 64


def test_all_methods_listen_to_as_much_but_the_one_that_says_so() -> None:
    dense = shape_named("qwen2.5-coder-0.5b")
    heard = {
        name: methods.recipe_of(name, method, dense, round(0.65 * dense.num_parameters), "all-35").calibration.sequences
        for name, method in methods.METHODS.items()
        if "all-35" in method.sizes
    }
    assert heard.pop("ours-kl-more") == 4 * 128
    assert set(heard.values()) == {128}


def test_rows_alone_are_as_many_as_the_size_leaves() -> None:
    dense = shape_named("qwen2.5-coder-0.5b")
    left = round(0.78 * dense.num_parameters)
    (stage,) = methods.vocabulary_alone(dense, left, None)
    whole, more = (dense.model_copy(update={"vocab_size": stage["max_size"] + n}) for n in (0, 1))
    assert whole.num_parameters <= left < more.num_parameters
