"""What training gives back: one cut model, trained in several ways on as many tokens each.

    flabc data mine python-stdlib more-itertools networkx -o tasks.jsonl
    python perf/recovery_study.py qwen2.5-coder-0.5b.gguf --tie --tasks tasks.jsonl --work build/recovery

Every row is measured on text that is neither calibrated nor trained on: Python, English, C++, and what the dense model
answers in conversations about tasks of the side test. HumanEval is read once for a row and chooses nothing: which state
of a run is kept says the loss on dev. What is in the result already is not made again, a run that was cut off goes on.
With several numbers of tokens it is drawn what they give: the tasks of the side dev that a model solves. Those are the
tasks by whose loss a run's state is kept, so the curve is a little too kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from flabc import artifact
from flabc.compress import load
from flabc.compress.chat import rendered
from flabc.compress.config import Recovery
from flabc.compress.data import mining, source
from flabc.compress.data.corpus import Document
from flabc.customising import customise
from flabc.errors import UsageError, require
from flabc.perf.drawings import write_curves
from flabc.perf.making import Maker, write
from flabc.perf.methods import DENSE, DTYPE, RESULTS, measured
from flabc.recipe import load as load_recipe
from flabc.recovering import recover
from flabc.runtime.evaluate.perplexity import score_text
from flabc.runtime.evaluate.source import field, read_jsonl
from flabc.runtime.evaluate.subject import Local
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.evaluate.tasks.humaneval import instruction
from flabc.runtime.measure.environment import environment
from flabc.runtime.sampling import SamplingParams

#: What is trained on as plain text.
TEXT = "python-stdlib"

#: Text of C++: pieces of torch's headers, so many characters each.
PIECES, CHARACTERS = 24, 3000

#: Conversations about tasks that nothing is trained on: how many, and how long an answer may become.
TALKS, TOKENS = 48, 128

#: Tokens of a sequence, sequences at once.
LENGTH, BATCH = 512, 4

CUT = "none"


@dataclass(frozen=True)
class Row:
    """A way to train.

    Args:
        title: as the table shows it.
        method: as for ``flabc recover``.
        tasks: all that were mined, or those that the cut model fails, or none.
        text: whether plain text is trained on as well.
        learning_rate: at its peak.
    """

    title: str
    method: str
    tasks: str | None
    text: bool
    learning_rate: float


ROWS = {
    "lora": Row("LoRA on the tasks", "lora", "tasks", text=False, learning_rate=2e-4),
    "lora-custom": Row("LoRA on the customised tasks", "lora", "custom", text=False, learning_rate=2e-4),
    "distill": Row("distillation on text", "distill", None, text=True, learning_rate=5e-5),
    "distill-custom": Row(
        "distillation on text and customised tasks", "distill", "custom", text=True, learning_rate=5e-5
    ),
}

#: Tasks of the side dev that are solved or not.
SOLVED = 100

#: What a row is measured by: a metric and its options; the file of C++ is made, that of dev is the one of the tasks.
MEASURED = {
    "python": EvalOptions(task="perplexity", corpus="python-stdlib", dtype=DTYPE),
    "english": EvalOptions(task="perplexity", corpus="english", dtype=DTYPE),
    "cpp": EvalOptions(task="perplexity", dtype=DTYPE),
    "dev": EvalOptions(task="mined:dev", limit=SOLVED, dtype=DTYPE, allow_code_execution=True),
    "humaneval": EvalOptions(task="humaneval", dtype=DTYPE, allow_code_execution=True),
}


def main() -> None:
    """Cut, customise, and train and measure what is missing, one row after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--tasks", type=Path, required=True, help="what `flabc data mine` wrote")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--recipe", default="flab-35")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    parser.add_argument("--work", type=Path, default=Path("build/recovery"))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[131_072], help="of each training")
    parser.add_argument("--ask", type=int, default=400, help="tasks that are customised at most")
    parser.add_argument("--skip-written", action="store_true", help="leave HumanEval for another run")
    asked = parser.parse_args()
    require("matplotlib", "report")  # the drawing comes last, after hours
    asked.work.mkdir(parents=True, exist_ok=True)
    study = Study(asked)
    study.measure(DENSE, study.dense, {"title": "dense"})
    study.measure(CUT, study.cut, {"title": "cut, not trained"})
    for name, tokens, seed in itertools.product(asked.rows, sorted(asked.tokens), asked.seeds):
        key = f"{name}/{tokens}/{seed}"
        if study.lacks(key):
            study.measure(key, *study.trained(ROWS[name], tokens, seed, asked.work / key))
    rows = study.result["rows"]
    write_curves(
        curves(rows),
        study.file.with_suffix(".svg"),
        "tokens of sequences trained on, thousands",
        "pass@1 on mined tasks of the side dev",
        ("dense", rows[DENSE]["dev"]["target"]["value"]),
    )


class Study:
    """The models, their data, and the result file."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.work: Path = asked.work
        self.mined: Path = asked.tasks
        check_sides(self.mined)
        self.file = RESULTS / f"{asked.name}.recovery.json"
        self.result: dict[str, Any] = json.loads(self.file.read_text()) if self.file.is_file() else {"rows": {}}
        self.dense, self.cut = self.work / DENSE, self.work / "cut"
        if not self.dense.exists():
            write(load.load(asked.model, tie=asked.tie), self.dense)
        self._settle(self._cut())
        made = {"cpp": {"corpus": str(self._cpp())}, "dev": {"data": self.mined}}
        self.measured = {
            name: options.model_copy(update=made.get(name, {}))
            for name, options in MEASURED.items()
            if not (asked.skip_written and name == "humaneval")
        }

    def _cut(self) -> dict[str, Any]:
        """Make the cut model, if it is not there; how it was made."""
        receipt = self.work / "cut.json"
        if not self.cut.exists():
            made = Maker(str(self.dense)).make(load_recipe(self.asked.recipe, ()), self.cut)
            artifact.write_whole(receipt, json.dumps({"recipe": self.asked.recipe, **made}))
        found: dict[str, Any] = json.loads(receipt.read_text())
        return found

    def _settle(self, made: dict[str, Any]) -> None:
        """Rows are of one cut model.

        Raises:
            UsageError: if the result has rows of another.
        """
        before = self.result.get("cut")
        same = ("parameters", "recipe", "calibration")
        if before is not None and any(before[key] != made[key] for key in same):
            raise UsageError(
                f"{self.file.name} has rows of another cut model.",
                expected=str({key: before[key] for key in same}),
                found=str({key: made[key] for key in same}),
                fix="Give the same model and recipe, or begin a file of its own with --name.",
            )
        self.result["cut"] = made

    def lacks(self, key: str) -> bool:
        """Whether something of a row has not been measured."""
        return any(name not in self.result["rows"].get(key, {}) for name in (*self.measured, "chat"))

    def trained(self, row: Row, tokens: int, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
        """A trained model, and what training said of itself."""
        receipt = folder.with_suffix(".json")
        if not folder.exists():
            options = Recovery.model_validate(
                {
                    "method": row.method,
                    "learning_rate": row.learning_rate,
                    "max_length": LENGTH,
                    "batch": BATCH,
                    "packing": True,
                    "dtype": DTYPE,
                    "seed": seed,
                    "max_steps": tokens // (LENGTH * BATCH),
                    "epochs": 100,  # the steps are what ends it
                }
            )
            began = time.monotonic()
            done = recover(
                self.cut,
                folder,
                data=self._tasks(row.tasks),
                text=TEXT if row.text else None,
                teacher=str(self.dense) if row.method == "distill" else None,
                options=options,
                resume=artifact.partial_of(folder).exists(),
            )
            said = done.model_dump(mode="json", exclude={"path", "teacher"}) | {
                "title": row.title,
                "seconds": round(time.monotonic() - began, 1),
                "learning_rate": row.learning_rate,
            }
            artifact.write_whole(receipt, json.dumps(said))
        return folder, json.loads(receipt.read_text())

    def _tasks(self, which: str | None) -> Path | None:
        """The file of tasks: as they were mined, or customised to the cut model."""
        if which != "custom":
            return self.mined if which else None
        file = self.work / "custom.jsonl"
        if not file.exists():
            rows = [row for row in read_jsonl(self.mined) if field(row, "split") != "test"]
            some = self.work / "asked.jsonl"
            artifact.write_whole(some, "".join(json.dumps(row) + "\n" for row in rows[: self.asked.ask]))
            options = EvalOptions(task="mined", dtype=DTYPE, allow_code_execution=True)
            done = customise(some, str(self.cut), str(self.dense), file, options)
            self.result["customised"] = done.model_dump(mode="json", exclude={"path"})
            self.save()
        return file

    def measure(self, key: str, model: Path, about: Mapping[str, Any]) -> None:
        """What is missing of a row."""
        cell = self.result["rows"].setdefault(key, {})
        cell |= about
        for name, options in self.measured.items():
            answers = self.work / "answers" / key / name
            if name not in cell or (key == DENSE and not answers.exists()):
                base = None if key == DENSE else self.work / "answers" / DENSE / name
                rows = measured(options, str(model), answers, base)
                cell[name] = rows[0].model_dump(mode="json")
                self.save()
        if "chat" not in cell:
            cell["chat"] = self._chat(model)
            self.save()

    def _cpp(self) -> Path:
        """Pieces of torch's headers, all of them on the held-out side."""
        file = self.work / "cpp.jsonl"
        if not file.exists():
            include = str(Path(torch.__file__).parent / "include" / "ATen")
            pieces = (text[:CHARACTERS] for _, text in source.read(include) if len(text) >= CHARACTERS)
            heldout = [piece for piece in pieces if Document("", piece).split == "heldout"][:PIECES]
            artifact.write_whole(file, "".join(json.dumps({"text": piece}) + "\n" for piece in heldout))
        return file

    def _chat(self, model: Path) -> dict[str, float]:
        """What a model needs for the dense model's own answers in conversations."""
        file = self.work / "talks.json"
        if not file.exists():
            artifact.write_whole(file, json.dumps(list(self._talks())))
        talks = json.loads(file.read_text())
        session = Local(model, EvalOptions(dtype=DTYPE), [asked + said for asked, said in talks]).session
        scores = [
            score_text(session.backend, session.codec, said, session.codec.encode(asked)) for asked, said in talks
        ]
        nats, tokens = (sum(each) for each in zip(*scores, strict=True))
        return {"nats": nats, "tokens": tokens}

    def _talks(self) -> Iterator[tuple[str, str]]:
        """What is asked, as the template has it, and what the dense model answers."""
        rows = [row for row in read_jsonl(self.mined) if field(row, "split") == "test"][:TALKS]
        files = load.load(str(self.dense)).tokenizer
        talks = [[{"role": "user", "content": instruction(row["prompt"])}] for row in rows]
        prompts = [text for talk in talks if (text := rendered(files, talk, prompt=True)) is not None]
        if not prompts:
            raise UsageError("The model has no chat template.")
        subject = Local(self.dense, EvalOptions(dtype=DTYPE, max_tokens=TOKENS), prompts)
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
        found = dict(subject.answers(prompts, [params] * len(prompts)))
        return ((prompt, found[at].text) for at, prompt in enumerate(prompts) if found[at].text)

    def save(self) -> None:
        """Write the result; what was there stays until the new one is whole."""
        self.result["environment"] = environment()
        artifact.write_whole(self.file, json.dumps(self.result, indent=1) + "\n")


def check_sides(tasks: Path) -> None:
    """Before anything is cut: train is learnt, dev says what is solved, test is talked about.

    Raises:
        UsageError: if there are no tasks of one of them.
    """
    sides, found = get_args(mining.Split), {field(row, "split") for row in read_jsonl(tasks)}
    if lacking := [side for side in sides if side not in found]:
        raise UsageError(
            f"{tasks} has no task of the side {' or '.join(lacking)}.",
            expected=", ".join(sides),
            found=", ".join(sorted(found)) or "no tasks",
            fix="Mine more projects: each is all on one side.",
        )


def curves(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Of each way to train, thousands of tokens and the mean pass@1 on dev of the seeds; each begins untrained."""
    found = dict[str, dict[int, list[float]]]()
    for key, cell in rows.items():
        name, *lengths = key.split("/")
        if lengths and "dev" in cell:
            at = found.setdefault(ROWS[name].title, {0: [rows[CUT]["dev"]["target"]["value"]]})
            at.setdefault(int(lengths[0]), []).append(cell["dev"]["target"]["value"])
    return {
        title: [(tokens / 1000, statistics.mean(values)) for tokens, values in sorted(at.items())]
        for title, at in found.items()
    }


#: The table's head, and how its columns are set.
HEAD = (
    "| row | tokens | minutes | Python | English | C++ | chat | dev | HumanEval |",
    "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def as_markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of what has been measured: perplexities per token of the dense model, and problems solved."""
    return "\n".join([*HEAD, *(_line(cell, rows[DENSE]) for cell in rows.values())])


def _line(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    cells = [
        cell["title"],
        f"{cell['tokens']:,}" if "tokens" in cell else "-",
        f"{cell['seconds'] / 60:.0f}" if "seconds" in cell else "-",
        *(f"{cell[name]['target']['value']:.2f}" if name in cell else "-" for name in ("python", "english", "cpp")),
        f"{math.exp(cell['chat']['nats'] / dense['chat']['tokens']):.2f}" if "chat" in cell else "-",
        *(_solved(cell[name]) if name in cell else "-" for name in ("dev", "humaneval")),
    ]
    return f"| {' | '.join(cells)} |"


def _solved(row: Mapping[str, Any]) -> str:
    return f"{row['target']['value'] * row['target']['n']:.0f}/{row['target']['n']}"


if __name__ == "__main__":
    main()
