"""Searches for per-layer rates against each other on one model: as many evaluations each, on the same places.

    python perf/search_study.py qwen2.5-coder-0.5b.gguf --tie --work build/search

Each row finds the FFN widths of a size, `depth` which attentions and FFNs stay at all. What it finds is cut, restored
in sequence and measured on text that was neither calibrated nor searched on. The language model is the model that is
cut. What is in the result already is not made again; a search that was cut off goes on with its journal.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from flabc import artifact
from flabc.compress import load
from flabc.errors import FlabcError
from flabc.perf.making import Maker, write
from flabc.perf.methods import CALIBRATION, DENSE, DTYPE, RESULTS, measured
from flabc.recipe import Recipe, parse
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.measure.environment import environment
from flabc.searching import Options, Searched, Shared, search

#: How much is left of the parameters inside the layers.
SIZES = {"20": 0.8, "30": 0.7, "50": 0.5}

EVALUATIONS = 430

#: Windows that candidates are compared on.
SEQUENCES = (2, 8)

#: The rows: how each is shown, and whom it asks. Those that propose once and for all come first; they share the places
#: with all that follow but the last.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "ramp": ("ramp (ATP)", {}),
    "global": ("global (FLAP)", {}),
    "random": ("random", {}),
    "evolution": ("evolution (EvoPress)", {}),
    "llm": ("the model itself (Self-Pruner)", {}),
    "depth": ("evolution of depth alone (EvoPress)", {"operator": "evolution", "levels": 1, "sub_blocks": True}),
}

#: How far FFN widths are apart; rows of engines are in blocks of 32.
MULTIPLE = 32

TASKS = ("perplexity", "kl")

#: What is kept of how a search's rates were cut.
CUT = ("parameters", "layers", "seconds", "cpu", "calibration", "stages")


def main() -> None:
    """Search, cut and measure what is missing, one row after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    parser.add_argument("--work", type=Path, default=Path("build/search"))
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--written", action="store_true", help="HumanEval too, of the best seed of each row")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    dense = asked.work / DENSE
    if not dense.exists():
        write(load.load(asked.model, tie=asked.tie), dense)
    study = Study(RESULTS / f"{asked.name}.search.json", asked.work, str(dense))
    study.measure(DENSE, str(dense), ("perplexity",))
    for seed in asked.seeds:
        for row in asked.rows:
            for size in asked.sizes:
                study.fill(size, row, seed)
    if asked.written:
        study.measure(DENSE, str(dense), ("humaneval",))
        for row in asked.rows:
            for size in asked.sizes:
                study.write_programs(size, row)


class Study:
    """The result file, and the folder where searches, models and answers lie."""

    def __init__(self, file: Path, work: Path, model: str) -> None:
        self.file, self.work, self.model = file, work, model
        self.cells: dict[str, Any] = json.loads(file.read_text())["cells"] if file.is_file() else {}
        self.shared, self.maker = Shared(), Maker(model)

    def fill(self, size: str, row: str, seed: int) -> None:
        """Search, cut and measure, unless it is done."""
        key = f"{size}/{row}/{seed}"
        if all(task in self.cells.get(key, {}) for task in TASKS) or "error" in self.cells.get(key, {}):
            return
        began = time.monotonic()
        try:
            found = self._search(size, row, seed)
        except FlabcError as error:
            self.cells[key] = {"error": str(error)}
            self.save()
            return
        self.cells.setdefault(key, {"search_seconds": round(time.monotonic() - began, 1)})
        self.cells[key] |= said_of(found)
        if (same := self._with_rates_of(key)) is not None:
            self.cells[key] |= {name: value for name, value in same.items() if name in (*CUT, *TASKS)}
            self.save()
            return
        with self._cut(key) as model:
            self.measure(key, model, TASKS)

    def _with_rates_of(self, key: str) -> Mapping[str, Any] | None:
        """A cell whose model is the same: many ways find the same rates with every seed."""
        stages = self.cells[key]["recipe"]["stages"]
        found = (cell for cell in self.cells.values() if all(task in cell for task in ("recipe", *TASKS)))
        return next((cell for cell in found if cell["recipe"]["stages"] == stages), None)

    def write_programs(self, size: str, row: str) -> None:
        """HumanEval by the seed whose model is nearest to the dense one on held-out text."""
        keys = [key for key in self.cells if key.startswith(f"{size}/{row}/") and "kl" in self.cells[key]]
        if keys:
            best = min(keys, key=lambda key: self.cells[key]["kl"]["target"]["value"])
            if "humaneval" not in self.cells[best]:
                with self._cut(best) as model:
                    self.measure(best, model, ("humaneval",))

    def _search(self, size: str, row: str, seed: int) -> Searched:
        """The rates, and the journal from which a search that was cut off goes on."""
        folder, (_, asked) = self.work / "searches" / size / row / str(seed), ROWS[row]
        options = {"operator": row, "evaluations": EVALUATIONS, "sequences": SEQUENCES, **asked}
        if row == "llm":
            options |= {"llm_folder": self.model, "fallback": "evolution"}
        recipe = recipe_of(f"{size}-{row}", SIZES[size], ["ffn", "heads"] if row == "depth" else ["ffn"])
        return search(
            self.model,
            recipe,
            folder,
            Options.model_validate(options),
            seed=seed,
            resume=folder.exists(),
            shared=self.shared,
        )

    @contextmanager
    def _cut(self, key: str) -> Iterator[str]:
        """The model that a search's rates make, restored in sequence; gone afterwards."""
        folder = self.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        found = self.cells[key]["recipe"]
        recipe = parse({**found, "stages": [*found["stages"], {"stage": "restore"}]}, key)
        made = self.maker.make(recipe, folder)
        self.cells[key] |= {name: made[name] for name in CUT}
        yield str(folder)
        shutil.rmtree(folder)

    def measure(self, key: str, model: str, tasks: Sequence[str]) -> None:
        """What a model says of held-out text and, if wanted, the programs that it writes."""
        cell = self.cells.setdefault(key, {})
        for task in tasks:
            options = EvalOptions(task=task, dtype=DTYPE, allow_code_execution=task == "humaneval")
            answers = self.work / "answers" / key / task
            if task in cell and (key != DENSE or answers.exists()):
                continue
            if key != DENSE:  # what is there is of a model that is gone
                shutil.rmtree(answers, ignore_errors=True)
            base = None if key == DENSE else self.work / "answers" / DENSE / task
            rows = measured(options, model, answers, base, self.model if task == "kl" else None)
            cell[task] = rows[0].model_dump(mode="json")
            self.save()

    def save(self) -> None:
        """Write the result; what was there stays until the new one is whole."""
        content = {"environment": environment(), "cells": self.cells}
        artifact.write_whole(self.file, json.dumps(content, indent=1) + "\n")


def recipe_of(name: str, left: float, of: Sequence[str]) -> Recipe:
    """What is searched: one stage, whose channels are ranked and refitted as flabc does it."""
    stage = {"stage": "widths", "of": of, "score": "obs", "multiple_of": MULTIPLE}
    return parse({"name": name, "target": {"block_params": left}, "calibration": CALIBRATION, "stages": [stage]}, name)


def said_of(found: Searched) -> dict[str, Any]:
    """What is kept of a search."""
    kept = {"evaluations", "repaired", "asked", "valid", "prompt_tokens", "completion_tokens", "recipe"}
    return found.model_dump(mode="json", include=kept) | {
        "searched_kl": found.best.kl,
        "heldout_kl": found.best.heldout_kl,
    }


#: The table's head, and how its columns are set.
HEAD = (
    "| left of the layers | rates by | seeds | KL | perplexity | HumanEval | evaluations | seconds | valid answers |",
    "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def as_markdown(cells: Mapping[str, Any]) -> str:
    """The table of what has been measured: means over seeds, and from where to where they reach."""
    lines = list(HEAD)
    for size, left in SIZES.items():
        for row, (title, _) in ROWS.items():
            found = [cell for key, cell in cells.items() if key.startswith(f"{size}/{row}/")]
            if found:
                lines.append(f"| {left:.0%} | {title} | {' | '.join(_facts(found))} |")
    return "\n".join(lines)


def _facts(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns behind a row's title."""
    done = [cell for cell in cells if all(task in cell for task in TASKS)]
    if not done:
        return ["0", "failed", *"-----"]
    asked = sum(cell["asked"] for cell in done)
    programs = [cell["humaneval"]["target"] for cell in done if "humaneval" in cell]
    return [
        str(len(done)),
        _range([cell["kl"]["target"]["value"] for cell in done], ".3f"),
        _range([cell["perplexity"]["target"]["value"] for cell in done], ".2f"),
        " ".join(f"{each['value'] * each['n']:.0f}/{each['n']}" for each in programs) or "-",
        _range([cell["evaluations"] for cell in done], ".0f"),
        _range([cell["search_seconds"] for cell in done], ".0f"),
        f"{sum(cell['valid'] for cell in done) / asked:.0%}" if asked else "-",
    ]


def _range(values: Sequence[float], shape: str) -> str:
    """The mean and, of several that differ, the least and the most."""
    least, middle, most = (format(each, shape) for each in (min(values), mean(values), max(values)))
    return middle if least == most else f"{middle} ({least}-{most})"


if __name__ == "__main__":
    main()
