"""The table of what training gives back: its rows are trained alike, and what they are measured by is transformers'."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flabc.errors import UsageError
from flabc.perf import recovery_study

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Functions that a tiny random model fails; one in five is never trained on."""
    file = tmp_path / "tasks.jsonl"
    rows = [
        {
            "task_id": f"t/{n}",
            "prompt": f'def add_{n}(value):\n    """Add {n} to value."""\n',
            "canonical_solution": f"    return value + {n}\n",
            "test": f"assert add_{n}(5) == 5 + {n}",
            "split": ("dev", "test", "train", "train", "train")[n % 5],
        }
        for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def study(
    tiny: Callable[[str], Path],
    tiny_recipe: Path,
    texts: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., dict[str, dict[str, object]]]:
    """Runs the script on a tiny model; the rows of its result."""
    few = {
        name: options.model_copy(update={"limit": 2, "dtype": "float32"})
        for name, options in recovery_study.MEASURED.items()
    }
    for name, value in {
        "RESULTS": tmp_path,
        "MEASURED": few,
        "TEXT": str(texts),
        "LENGTH": 96,
        "BATCH": 2,
        "TALKS": 3,
        "TOKENS": 8,
        "DTYPE": "float32",
    }.items():
        monkeypatch.setattr(recovery_study, name, value)

    def run(*more: str) -> dict[str, dict[str, object]]:
        model, work = str(tiny("qwen2-tied")), str(tmp_path / "work")
        asked = [model, "--tasks", str(tasks), "--recipe", str(tiny_recipe), "--name", "tiny", "--work", work]
        monkeypatch.setattr(sys, "argv", ["recovery_study.py", *asked, "--tokens", "960", "--skip-written", *more])
        recovery_study.main()
        found: dict[str, dict[str, object]] = json.loads((tmp_path / "tiny.recovery.json").read_text())["rows"]
        return found

    return run


def test_rows_are_trained_on_as_much_and_made_once(
    study: Callable[..., dict[str, dict[str, object]]],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = study()
    trained = [f"{name}/960/0" for name in recovery_study.ROWS]
    assert list(rows) == ["dense", "none", *trained]
    assert {rows[key]["steps"] for key in trained} == {5}
    assert rows["none"]["chat"] != rows["dense"]["chat"]
    said_by_transformers = nats_of(tiny("qwen2-tied"), json.loads((tmp_path / "work" / "talks.json").read_text()))
    assert rows["dense"]["chat"] == pytest.approx(said_by_transformers, rel=1e-4)
    assert all(rows[key]["python"]["baseline"] for key in ("none", *trained))  # type: ignore[index]
    result = json.loads((tmp_path / "tiny.recovery.json").read_text())
    customised, cut = result["customised"], result["cut"]
    assert customised["failed"] == customised["canonical"] == 24
    table = recovery_study.as_markdown(rows).splitlines()
    assert len(table) == 2 + len(rows)
    assert table[4].startswith("| LoRA on the tasks | ")
    assert rows["none"]["dev"]["target"]["n"] == 2  # type: ignore[index]

    monkeypatch.setattr(recovery_study, "recover", None)  # nothing is trained again
    assert study() == rows
    (tmp_path / "work" / "cut.json").write_text(json.dumps({**cut, "parameters": 1}))
    with pytest.raises(UsageError, match=r"another cut model.*'parameters': \d\d+.*'parameters': 1\D"):
        study()


def test_more_tokens_are_points_of_a_curve(study: Callable[..., dict[str, dict[str, object]]], tmp_path: Path) -> None:
    rows = study("--rows", "lora", "--tokens", "384", "192")
    assert list(rows) == ["dense", "none", "lora/192/0", "lora/384/0"]
    assert [rows[key]["steps"] for key in ("lora/192/0", "lora/384/0")] == [1, 2]
    drawing = (tmp_path / "tiny.recovery.svg").read_text()
    assert "LoRA on the tasks" in drawing
    assert "dense" in drawing


def test_tasks_of_all_sides_are_asked_for_at_first(study: Callable[..., object], tasks: Path, tmp_path: Path) -> None:
    tasks.write_text("".join(line + "\n" for line in tasks.read_text().splitlines() if '"test"}' not in line))
    with pytest.raises(UsageError, match=r"no task of the side test.*dev, train"):
        study()
    assert not list((tmp_path / "work").iterdir())


def test_curves_are_means_of_seeds() -> None:
    solved = {"none": 0.1, "lora/2000/0": 0.2, "lora/2000/1": 0.4, "lora/1000/0": 0.2, "distill/1000/0": 0.5}
    rows = {key: {"dev": {"target": {"value": value}}} for key, value in solved.items()}
    assert recovery_study.curves({**rows, "lora/4000/0": {}}) == {
        "LoRA on the tasks": [(0, 0.1), (1, 0.2), (2, pytest.approx(0.3))],
        "distillation on text": [(0, 0.1), (1, 0.5)],
    }


def nats_of(folder: Path, talks: list[tuple[str, str]]) -> dict[str, float]:
    """What transformers says that a model needs for answers in conversations."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = tokens = 0.0
    for asked, said in talks:
        assert asked.startswith("<|im_start|>user\n")
        before, after = (tokenizer(each, add_special_tokens=False)["input_ids"] for each in (asked, said))
        with torch.no_grad():
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        nats -= float(logits.log_softmax(-1).gather(-1, torch.tensor(after)[:, None]).sum())
        tokens += len(after)
    assert tokens
    return {"nats": nats, "tokens": tokens}
