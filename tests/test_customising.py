"""Customised data: what the cut model fails, and whose answer it is to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from flabc import customising
from flabc.cli import cli
from flabc.errors import CorpusError, UsageError
from flabc.runtime.evaluate.subject import Local, Said
from flabc.runtime.evaluate.task import EvalOptions

ALLOWED = EvalOptions(allow_code_execution=True, max_tokens=8)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.jsonl"
    rows = [
        {
            "task_id": f"t/{n}",
            "prompt": f"def add_{n}(value):\n",
            "canonical_solution": f"    # a person's\n    return value + {n}\n",
            "test": f"assert add_{n}(5) == 5 + {n}",
            "split": "test" if n == 9 else "dev" if n == 8 else "train",
        }
        for n in range(10)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


class Scripted:
    """Stands for a model folder: the cut one adds numbers below 3, the dense one those below 6."""

    asked: tuple[str, ...] = ()
    breaks_at: int | None = None

    def __init__(self, folder: Path, options: EvalOptions, prompts: Sequence[str]) -> None:
        self.bound = 3 if "qwen2" in str(folder) else 6

    def answers(self, prompts: Sequence[str], params: Sequence[Any]) -> Iterator[tuple[int, Said]]:
        for index, prompt in enumerate(prompts):
            if len(Scripted.asked) == Scripted.breaks_at:
                raise KeyboardInterrupt
            Scripted.asked += (f"{self.bound} {prompt}",)
            number = int(prompt.partition("_")[2].partition("(")[0])
            yield index, Said(f"    return value + {number if number < self.bound else -1}", 5, "stop")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(customising, "Local", Scripted)
    monkeypatch.setattr(Scripted, "asked", ())
    monkeypatch.setattr(Scripted, "breaks_at", None)
    return Scripted


@pytest.fixture
def models(tiny: Callable[[str], Path]) -> tuple[str, str]:
    return str(tiny("qwen2-tied")), str(tiny("llama-tied"))


def test_what_is_failed_is_kept_with_the_teachers_answer_or_the_persons(
    scripted: type[Scripted], tasks: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    found = customising.customise(tasks, *models, tmp_path / "custom.jsonl", ALLOWED)
    assert found.model_dump(exclude={"path"}) == {
        **{"tasks": 10, "asked": 9, "failed": 6, "teacher": 3, "canonical": 3},
    }
    rows = [json.loads(line) for line in found.path.read_text().splitlines()]
    assert [(row["task_id"], row["target"]) for row in rows] == [
        *((f"t/{n}", "teacher") for n in (3, 4, 5)),
        *((f"t/{n}", "canonical") for n in (6, 7, 8)),
    ]
    assert rows[0]["canonical_solution"] == "    return value + 3\n"
    assert rows[-1]["canonical_solution"] == "    # a person's\n    return value + 8\n"
    asked_dense = [each for each in scripted.asked if each.startswith("6")]
    assert len(asked_dense) == 6  # nothing that the cut model can do


def test_a_run_that_was_cut_off_asks_nothing_twice(
    scripted: type[Scripted], tasks: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = customising.customise(tasks, *models, tmp_path / "whole.jsonl", ALLOWED)
    scripted.asked, scripted.breaks_at = (), 12
    broken = tmp_path / "broken.jsonl"
    with pytest.raises(KeyboardInterrupt):
        customising.customise(tasks, *models, broken, ALLOWED)
    assert not broken.exists()
    scripted.breaks_at = None
    again = customising.customise(tasks, *models, broken, ALLOWED)
    assert broken.read_bytes() == whole.path.read_bytes()
    assert again.model_dump(exclude={"path"}) == whole.model_dump(exclude={"path"})
    assert len(scripted.asked) == len(set(scripted.asked)) == 15


def test_real_models_are_asked_through_the_command(tiny: Callable[[str], Path], tasks: Path, tmp_path: Path) -> None:
    """Random models solve nothing: every task stays as it is. ``Local`` is the evaluation's own."""
    assert customising.Local is Local
    out = tmp_path / "custom.jsonl"
    asked = ["data", "customise", str(tasks), "--model", str(tiny("qwen2-tied")), "--teacher", str(tiny("llama-tied"))]
    refused = CliRunner().invoke(cli, [*asked, "-o", str(out)])
    assert isinstance(refused.exception, UsageError)
    done = CliRunner().invoke(cli, [*asked, "-o", str(out), "--max-tokens", "4", "--allow-code-execution", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["canonical"] == 9
    rows, before = ([json.loads(line) for line in file.read_text().splitlines()] for file in (out, tasks))
    assert rows == [{**row, "target": "canonical"} for row in before[:9]]


def test_files_that_do_not_fit_are_refused(models: tuple[str, str], tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        customising.customise(tasks, *models, tasks, ALLOWED)
    twice = tmp_path / "twice.jsonl"
    twice.write_text(tasks.read_text() * 2)
    with pytest.raises(CorpusError, match="the same task_id"):
        customising.customise(twice, *models, tmp_path / "out.jsonl", ALLOWED)
