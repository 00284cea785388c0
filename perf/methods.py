"""Pruning methods against each other on one model: the table of the README, measured cell by cell.

    python perf/methods.py qwen2.5-coder-0.5b.gguf --tie --work build/methods

Every method draws on the same calibration text, tokens and seed. What is in the result already, made by the same
recipe, is not made again; so the run can be cut off and started anew. Models lie in the work folder until they are
measured, answers stay there. A cell that lacks a measurement is made and measured anew if its model is gone.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flabc import api, artifact
from flabc.compress import load, pipeline
from flabc.compress.config import Calibration, Target
from flabc.compress.devices import compute_dtype, name_of
from flabc.errors import FlabcError, UsageError
from flabc.perf import comparison, evaluation
from flabc.perf.making import Maker, as_read, write
from flabc.recipe import Recipe, parse
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.measure.environment import environment
from flabc.spec import ModelSpec

RESULTS = Path(__file__).resolve().parent / "results"

#: Text that the vocabulary is chosen on, and text that is listened to.
VOCABULARY = ["python-stdlib", "python-packages", "english"]
CALIBRATION: dict[str, Any] = {"corpus": ["python-stdlib", "python-packages"], "sequences": 128, "sequence_length": 512}

#: How much is left: of all parameters, or of those inside the layers.
TARGETS: dict[str, dict[str, float]] = {
    f"{of}-{percent}": {field: 1 - percent / 100}
    for percent in (22, 35, 50)
    for of, field in (("all", "params"), ("blocks", "block_params"))
}

#: Rows of vocabulary that flabc keeps: where these and the channels that go instead cost the least by `perf/axes.py`.
#: That has not measured as many channels as half a model needs: those rows are by hand, on the text that is scored.
ROWS = {"all-22": 39_232, "all-35": 28_160, "all-50": 28_672}

#: Sizes at which code is written, not only read.
WRITTEN = ("all-22", "all-35", "blocks-22", "blocks-35")

#: As many tokens more, as a share, are heard by flabc as the first of a text: what recipes do if nothing is said.
FIRST_TOKENS = Calibration().first_tokens

#: What models are read in; each machine reads the dense one anew, so a row is compared with one of its own dtype.
DTYPE = name_of(compute_dtype(torch.device("cpu")))

DENSE = "dense"

Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """A row: its name in the table, and the stages that make it at a size.

    Args:
        title: as the table shows it.
        stages: from the dense model's spec, the parameters to leave, and the rows to keep, None for all.
        emitted: cut the vocabulary first to the tokens that the corpus emits, whatever they are derived from.
        target: whether the stages are told the target; else they count for themselves.
        generated: listen to as much of the dense model's own text as of each corpus, beside these.
        first_tokens: hear so many tokens more, each as the first of a text.
        times: listen to so many times the text of the others.
        sizes: at which it is made.
    """

    title: str
    stages: Callable[[ModelSpec, int, int | None], Stages]
    emitted: bool = False
    target: bool = True
    generated: bool = False
    first_tokens: float = 0.0
    times: int = 1
    sizes: Collection[str] = tuple(TARGETS)


def layers_to_go(spec: ModelSpec, parameters: int, share: float = 1.0) -> int:
    """Whole layers that come nearest to a share of what has to go."""
    inside = spec.num_parameters - spec.model_copy(update={"layers": spec.layers[:1]}).num_parameters
    return round(share * (spec.num_parameters - parameters) / (inside / (len(spec.layers) - 1)))


def flab_pruner(spec: ModelSpec, parameters: int, _: int | None) -> Stages:
    """Layers by the last token's cosine for half of what has to go, the first channels of each FFN for the rest."""
    count = math.floor(layers_to_go(spec, parameters, 0.5))
    cut = {"stage": "layers", "count": count, "criterion": "last_token_cosine"}
    narrowed = {"stage": "widths", "score": "first_n", "restore": False, "multiple_of": 1}
    return [*([cut] if count else []), narrowed]


def shortgpt(spec: ModelSpec, parameters: int, _: int | None) -> Stages:
    """The nearest number of whole layers, by block influence, measured once."""
    count = layers_to_go(spec, parameters)
    return [{"stage": "layers", "count": count, "criterion": "bi", "order": "one_shot", "sequences": 64}]


def wanda_sp(*_: Any) -> Stages:
    """The same rate everywhere. Channels only: a rate cannot be taken from the two KV groups of this model."""
    return [{"stage": "widths", "score": "wanda", "restore": False, "multiple_of": 1}]


def flap(*of: str) -> Callable[..., Stages]:
    """One standardised threshold over what is cut. Without its bias, which the architecture lacks."""
    stage = {"stage": "widths", "of": list(of), "score": "wifv", "allocation": "global", "restore": False}
    return lambda *_: [{**stage, "multiple_of": 1}]


#: Restored as the recipes do it, and with every fit damped alike and none of what begins a sub-block. The rows that the
#: table has of the latter are older: there 1 % was of the mean square of all inputs, here it is of each one's own.
RESTORED: Stages = [{"stage": "restore"}]
DAMPED: Stages = [{"stage": "restore", "damping": 0.01, "inputs": False}]


def ours(restored: Stages, *, allocation: str = "uniform") -> Callable[[ModelSpec, int, int | None], Stages]:
    """Vocabulary first, then channels one after another; restored in sequence or not."""

    def stages(_: ModelSpec, __: int, rows: int | None) -> Stages:
        cut = {"stage": "vocab", "corpus": VOCABULARY, "max_size": rows}
        narrowed = {"stage": "widths", "score": "obs", "restore": False, "multiple_of": 16, "allocation": allocation}
        return [*([cut] if rows else []), narrowed, *restored]

    return stages


def vocabulary_alone(spec: ModelSpec, parameters: int, _: int | None) -> Stages:
    """Every layer as it was: rows alone make up for the whole cut."""
    rows = spec.vocab_size - math.ceil((spec.num_parameters - parameters) / spec.hidden_size)
    return [{"stage": "vocab", "corpus": VOCABULARY, "max_size": rows}]


METHODS = {
    "flab-pruner": Method("Flab-Pruner as its code ships", flab_pruner, emitted=True),
    "shortgpt": Method("ShortGPT", shortgpt, target=False),
    "wanda-sp": Method("Wanda-sp, uniform", wanda_sp),
    "flap": Method("FLAP", flap("ffn", "heads")),
    "flap-channels": Method("FLAP, channels only", flap("ffn")),
    "ours-unrestored": Method("flabc without restoration", ours([]), first_tokens=FIRST_TOKENS),
    "ours": Method("flabc", ours(RESTORED), first_tokens=FIRST_TOKENS),
    "ours-kl": Method("flabc, rates by KL", ours(RESTORED, allocation="kl"), first_tokens=FIRST_TOKENS),
    "ours-kl-more": Method(
        "flabc, rates by KL, four times the text",
        ours(RESTORED, allocation="kl"),
        first_tokens=FIRST_TOKENS,
        times=4,
        sizes=("all-22", "all-35"),
    ),
    "ours-rows": Method("flabc, vocabulary alone", vocabulary_alone, sizes=("all-22",)),
    "ours-damped": Method("flabc, fits damped by 1 %", ours(DAMPED), first_tokens=FIRST_TOKENS),
    "ours-kl-damped": Method(
        "flabc, rates by KL, fits damped by 1 %", ours(DAMPED, allocation="kl"), first_tokens=FIRST_TOKENS
    ),
    "ours-text-unrestored": Method("flabc without restoration, on texts alone", ours([])),
    "ours-text": Method("flabc, on texts alone, fits damped by 1 %", ours(DAMPED)),
    "ours-generated": Method(
        "flabc, on texts alone, the model's own too, fits damped by 1 %", ours(DAMPED), generated=True
    ),
}


#: The table's head, and how its columns are set.
HEAD = (
    "| left | method | parameters | KL | perplexity | seconds | HumanEval |",
    "| :--- | :--- | ---: | ---: | ---: | ---: | ---: |",
)


def as_markdown(cells: Mapping[str, Any]) -> str:
    """The table of what has been measured: a row for each method at each size."""
    lines = [*HEAD, _row("all", "dense", cells[DENSE])]
    for size, target in TARGETS.items():
        ((of, share),) = target.items()
        left = f"{share:.0%} of {'all' if of == 'params' else 'the layers'}"
        found = [(method.title, cells.get(f"{size}/{name}")) for name, method in METHODS.items()]
        lines += [_row(left, title, cell) for title, cell in found if cell is not None]
    return "\n".join(lines)


def _row(left: str, title: str, cell: Mapping[str, Any]) -> str:
    if "error" in cell:
        return f"| {left} | {title} | - | - | {cell['error']} | - | - |"
    facts = [
        f"{cell['parameters'] / 1e6:.1f} M",
        _shown(cell.get("kl"), _kl),
        _shown(cell.get("perplexity"), _perplexity),
        f"{cell['seconds']:.0f}" if "seconds" in cell else "-",
        _shown(cell.get("humaneval"), _solved),
    ]
    return f"| {left} | {title} | {' | '.join(facts)} |"


def _shown(rows: Any, show: Callable[[Mapping[str, Any]], str]) -> str:
    """The first row of an evaluation; "-" if it was not made, "failed" if it could not be."""
    if rows is None:
        return "-"
    return show(rows[0]) if isinstance(rows, list) else "failed"


def _kl(row: Mapping[str, Any]) -> str:
    """Nats per token."""
    return f"{row['target']['value']:.3f}"


def _perplexity(row: Mapping[str, Any]) -> str:
    """Perplexity, and how it compares with the dense model's."""
    value, base = row["target"]["value"], row["baseline"]
    return f"{value:.2f}" + (f" ({value / base['value'] - 1:+.1%})" if base else "")


def _solved(row: Mapping[str, Any]) -> str:
    """Problems solved, and how sure the difference is."""
    solved = f"{row['target']['value'] * row['target']['n']:.0f}/{row['target']['n']}"
    if not row["baseline"]:
        return solved
    return f"{solved} ({row['gained']} gained, {row['lost']} lost, p = {row['p_value']:.2g})"


def main() -> None:
    """Fill the cells that are missing, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    parser.add_argument("--work", type=Path, default=Path("build/methods"))
    parser.add_argument("--sizes", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--skip-written", action="store_true", help="leave HumanEval for another run")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    dense = asked.work / DENSE
    if not dense.exists():
        write(load.load(asked.model, tie=asked.tie), dense)
    table = Table(RESULTS / f"{asked.name}.methods.json", asked.work, str(dense))
    table.measure(DENSE, str(dense), tasks(DENSE, written=not asked.skip_written))
    for size in asked.sizes:
        for name in [name for name in asked.methods if size in METHODS[name].sizes]:
            key = f"{size}/{name}"
            wanted = tasks(size, written=not asked.skip_written)
            if table.make(key, METHODS[name], size, wanted):
                table.measure(key, str(asked.work / key), wanted)
                shutil.rmtree(asked.work / key, ignore_errors=True)


def tasks(size: str, *, written: bool) -> tuple[str, ...]:
    """What a cell of this size is measured by."""
    if size == DENSE:
        return ("perplexity", *(["humaneval"] if written else []))
    return ("perplexity", "kl", *(["humaneval"] if written and size in WRITTEN else []))


class Table:
    """The result file, and the folder where models and answers lie."""

    def __init__(self, file: Path, work: Path, model: str) -> None:
        self.file, self.work, self.model = file, work, model
        self.maker = Maker(model)
        self.cells: dict[str, Any] = json.loads(file.read_text())["cells"] if file.is_file() else {}

    def make(self, key: str, method: Method, size: str, wanted: Sequence[str]) -> bool:
        """Compress, unless it is done; whether there is a model of which something is to be measured."""
        dense = api.inspect(self.model).spec
        left = pipeline.parameters_left(Target.model_validate(TARGETS[size]), dense)
        recipe = recipe_of(key, method, dense, left, size)
        cell, made = self.cells.get(key, {}), self.work / key
        if made_by(cell, recipe):
            if "error" in cell or all(task in cell for task in wanted):
                return False
            if made.exists():
                return True
        self._check_text(key, recipe.calibration)
        # Another machine makes another model of the same recipe: nothing of the last holds.
        shutil.rmtree(self.work / "answers" / key, ignore_errors=True)
        self.cells[key] = cell = {"recipe": recipe.model_dump(mode="json"), "title": method.title}
        shutil.rmtree(made, ignore_errors=True)
        try:
            cell |= self.maker.make(recipe, made, emitted=method.emitted and size.startswith("all"))
        except FlabcError as error:
            cell["error"] = str(error)
        self.save()
        return "error" not in cell

    def _check_text(self, key: str, calibration: Calibration) -> None:
        """Methods are compared on one text, and that of the packages that are installed changes with them.

        Raises:
            UsageError: if another row listened to another one.
        """
        others = {
            name: cell["calibration"]
            for name, cell in self.cells.items()
            if name != key
            and "calibration" in cell
            and as_read(Calibration.model_validate(cell["recipe"]["calibration"])) == as_read(calibration)
        }
        here = self.maker.fingerprint(calibration) if others else ""
        for name, there in others.items():
            if there != here:
                raise UsageError(
                    f"{name} in {self.file.name} listened to other text than there is here.",
                    expected=f"a fingerprint of {there[:8]}",
                    found=here[:8],
                    fix="Install the same packages, or begin a file of its own with --name.",
                )

    def measure(self, key: str, model: str, wanted: Sequence[str]) -> None:
        """What the model says of held-out text and, if wanted, the programs that it writes."""
        cell = self.cells.setdefault(key, {"title": key, "parameters": api.inspect(model).spec.num_parameters})
        for task in wanted:
            # Every other cell is compared with the dense model's answers, problem by problem.
            answers = self.work / "answers" / key / task
            if task not in cell or (key == DENSE and not answers.exists()):
                cell["dtype"] = DTYPE
                try:
                    cell[task] = self.evaluate(key, model, task)
                except FlabcError as error:
                    cell[task] = {"error": str(error)}
                self.save()

    def evaluate(self, key: str, model: str, task: str) -> list[dict[str, Any]]:
        """The rows of one evaluation, paired with the dense model's answers."""
        options = EvalOptions(task=task, dtype=DTYPE, allow_code_execution=task == "humaneval")
        answers = self.work / "answers"
        against = self.model if task == "kl" else None
        base = None if key == DENSE else answers / DENSE / task
        rows = measured(options, model, answers / key / task, base, against)
        return [row.model_dump(mode="json") for row in rows]

    def save(self) -> None:
        """Write the result; what was there stays until the new one is whole."""
        content = {"environment": environment(), "cells": self.cells}
        artifact.write_whole(self.file, json.dumps(content, indent=1) + "\n")


def measured(
    options: EvalOptions, model: str, answers: Path, base: Path | None, against: str | None = None
) -> Sequence[comparison.EvalRow]:
    """The rows of one evaluation.

    Args:
        options: what is measured.
        model: of whom, unless its answers are there.
        answers: the folder that has them, or gets them.
        base: the dense model's answers, to pair them with; None for its own.
        against: the model that answers are compared with as they are made, in place of ``base``.
    """
    if not answers.exists():
        api.evaluate(model, options, baseline=against, output=answers)
    if base is None or against is not None:
        return api.read_evaluation(answers).rows
    return comparison.compare(options, *(evaluation.read_records(at) for at in (answers, base)))


def made_by(cell: Mapping[str, Any], recipe: Recipe) -> bool:
    """Whether a cell comes from this recipe; a field that is newer than the cell counts as its default."""
    try:
        return "recipe" in cell and parse(cell["recipe"], recipe.name) == recipe
    except FlabcError:
        return False


def recipe_of(key: str, method: Method, dense: ModelSpec, left: int, size: str) -> Recipe:
    """A cell's recipe."""
    stages = method.stages(dense, left, ROWS.get(size))
    target = {"target": {"params": left}} if method.target else {}
    heard = {"sequences": method.times * CALIBRATION["sequences"], "first_tokens": method.first_tokens}
    calibration = {**CALIBRATION, "generated": method.generated, **heard}
    return parse({"name": key, **target, "calibration": calibration, "stages": stages}, key)


if __name__ == "__main__":
    main()
