"""What rows of vocabulary cost, and what FFN channels cost, on what the dense model writes: where to cut how much.

    pip download --no-deps -d packages boltons humanize pydash toolz
    python perf/axes.py qwen2.5-coder-0.5b.gguf --tie --work build/axes packages/*.whl

The dense model goes on from signatures and docstrings of code that no calibration text holds. A cut costs the nats that
its model needs for these answers more than the dense one. Rows and channels are measured apart, and are taken to add
up: the best split of a size is where both together cost the least. What is in the result already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from flabc import artifact
from flabc.compress import load, pipeline
from flabc.compress.config import Calibration
from flabc.compress.data import mining
from flabc.compress.data.mining import Task
from flabc.compress.data.projects import projects
from flabc.compress.model import CausalLM
from flabc.errors import UsageError
from flabc.perf.making import write
from flabc.perf.methods import CALIBRATION, DTYPE, RESULTS, VOCABULARY
from flabc.recipe import parse
from flabc.runtime.evaluate.perplexity import score_text
from flabc.runtime.evaluate.subject import Local
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.evaluate.tasks import humaneval
from flabc.runtime.measure.environment import environment
from flabc.runtime.sampling import SamplingParams
from flabc.spec import ModelSpec

#: What is measured: rows that are kept, and shares of every FFN that go.
ROWS = (40_960, 30_720, 24_576, 18_432, 12_288)
SHARES = (0.05, 0.15, 0.25, 0.4)

#: Prompts that are asked, characters of each at most, tokens of an answer at most.
PROMPTS, CHARACTERS, TOKENS = 128, 800, 128

#: Windows that a narrowed model is fitted on; few, since the order of cuts is asked for and not the best of each.
SEQUENCES = 32

#: Splits are looked for among multiples of this many rows: fine enough that rows alone may hit a size.
STEP = 64


def main() -> None:
    """Measure what is missing, one cut after another, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("sources", nargs="+", help="code to go on from: folders, archives, installed packages")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    parser.add_argument("--work", type=Path, default=Path("build/axes"))
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    dense = load.load(asked.model, tie=asked.tie)
    file = RESULTS / f"{asked.name}.axes.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"costs": {}}
    said = Answers(asked.work / "answers.json", dense, asked.work, asked.sources)
    calibration = Calibration.model_validate({**CALIBRATION, "sequences": SEQUENCES})
    about = {**said.about(), "first_tokens": calibration.first_tokens}
    check_same(result, about, file)
    result |= {"environment": environment(), "sources": [Path(name).name for name in asked.sources], **about}
    text = pipeline.text_of(dense, calibration, "cpu", 0)
    for key, stages in cuts():
        if key not in result["costs"]:
            recipe = parse({"name": key, "stages": stages}, key)
            started = time.monotonic()
            cut, _, _ = pipeline.run(dense, recipe.stages, target=None, calibration=calibration, text=text)
            seconds = round(time.monotonic() - started, 1)
            gone = dense.spec.num_parameters - cut.spec.num_parameters
            result["costs"][key] = {"parameters_gone": gone, "nats": said.cost(cut), "seconds": seconds}
            artifact.write_whole(file, json.dumps(result, indent=1) + "\n")
            print(key, result["costs"][key], flush=True)


def check_same(result: dict[str, Any], about: dict[str, Any], file: Path) -> None:
    """Costs are differences to the dense model on the same answers, which another processor may write otherwise.

    Raises:
        UsageError: if what is in the result was measured on other answers, or fitted to other first tokens.
    """
    if result["costs"] and {key: result.get(key) for key in about} != about:
        raise UsageError(
            f"The costs in {file.name} were measured on other answers, or fits heard other first tokens.",
            expected=str({key: result.get(key) for key in about}),
            found=str(about),
            fix="Give the work folder that has its answers, or remove the file.",
        )


def cuts() -> list[tuple[str, list[dict[str, Any]]]]:
    """What is measured, and the stages that make it."""
    rows = [(f"rows-{n}", [{"stage": "vocab", "corpus": VOCABULARY, "max_size": n}]) for n in ROWS]
    narrowed = {"stage": "widths", "score": "obs", "restore": False, "multiple_of": 16}
    return rows + [(f"channels-{share}", [{**narrowed, "rate": share}, {"stage": "restore"}]) for share in SHARES]


class Answers:
    """What the dense model wrote, and what it needs for that itself.

    Args:
        file: where the answers are kept.
        dense: the model that is asked, if they are not there.
        work: a folder for models.
        sources: whose functions it is asked for.
    """

    def __init__(self, file: Path, dense: CausalLM, work: Path, sources: Sequence[str]) -> None:
        self.work = work
        if not file.is_file():
            prompts = prompts_of(sources)
            artifact.write_whole(file, json.dumps(list(zip(prompts, self._written(dense, prompts), strict=True))))
        self.rows: list[tuple[str, str]] = [(said, answer) for said, answer in json.loads(file.read_text()) if answer]
        self.dense_nats, self.tokens = self._nats(dense)

    def about(self) -> dict[str, Any]:
        """What costs are relative to."""
        return {"answers": len(self.rows), "tokens": self.tokens, "dense_nats": round(self.dense_nats, 4)}

    def cost(self, model: CausalLM) -> float:
        """Nats per answer that a model needs more than the dense one."""
        return round(self._nats(model)[0] - self.dense_nats, 4)

    def _written(self, model: CausalLM, prompts: list[str]) -> list[str]:
        """The most likely answers, up to where the next function would begin."""
        params = SamplingParams(max_tokens=TOKENS, temperature=0.0, stop=humaneval.STOP)
        subject = self._opened(model, prompts)
        found = dict(subject.answers(prompts, [params] * len(prompts)))
        return [found[at].text for at in range(len(prompts))]

    def _nats(self, model: CausalLM) -> tuple[float, int]:
        """Nats per answer, and tokens of all."""
        session = self._opened(model, [said + answer for said, answer in self.rows]).session
        scores = [
            score_text(session.backend, session.codec, answer, session.codec.encode(said)) for said, answer in self.rows
        ]
        return float(np.mean([nats for nats, _ in scores])), sum(tokens for _, tokens in scores)

    def _opened(self, model: CausalLM, prompts: Sequence[str]) -> Local:
        folder = self.work / "model"
        shutil.rmtree(folder, ignore_errors=True)
        write(model, folder)
        return Local(folder, EvalOptions(dtype=DTYPE, max_tokens=TOKENS), prompts)


def prompts_of(sources: Sequence[str]) -> list[str]:
    """Signatures and docstrings with what they need before them, drawn from all that there are."""
    read = [project for source in sources for project in projects(source)]
    found = [task.prompt for project in read for task in mining.mine(project) if isinstance(task, Task)]
    fitting = [prompt for prompt in found if len(prompt) <= CHARACTERS]
    return [fitting[at] for at in np.random.default_rng(0).permutation(len(fitting))[:PROMPTS]]


def as_markdown(result: dict[str, Any]) -> str:
    """What each cut costs, and what costs are relative to."""
    tokens = round(result["tokens"] / result["answers"])
    relative = f"for which the dense model needs {result['dense_nats']:.2f} nats each"
    said = f"{result['answers']} answers of {tokens} tokens, {relative}:"
    lines = [said, "", "| cut | parameters gone | nats per answer |", "| :--- | ---: | ---: |"]
    for key, cost in result["costs"].items():
        kind, _, size = key.partition("-")
        what = f"to {int(size):,} rows of vocabulary" if kind == "rows" else f"{float(size):.0%} of every FFN"
        lines.append(f"| {what} | {cost['parameters_gone'] / 1e6:.1f} M | +{cost['nats']:.2f} |")
    return "\n".join(lines)


def rows_for(spec: ModelSpec, parameters: int, costs: dict[str, Any]) -> int:
    """How many rows to keep of a model that is to have so many parameters, the rest to go from its FFNs.

    Raises:
        UsageError: if more channels would have to go than were measured.
    """
    by_rows, by_channels = (_curve(costs, kind) for kind in ("rows", "channels"))
    gone = spec.num_parameters - parameters
    most = min(spec.vocab_size, ROWS[0])
    needed, measured = gone - (spec.vocab_size - most) * spec.hidden_size, by_channels.x[-1]
    if needed > measured:
        raise UsageError(
            "This size may need more channels to go than were measured.",
            expected=f"at most {measured:,.0f} parameters from the FFNs",
            found=f"{needed:,}",
            fix="Measure a larger share.",
        )
    splits = [(rows, (spec.vocab_size - rows) * spec.hidden_size) for rows in range(ROWS[-1], most + 1, STEP)]
    return min(splits, key=lambda split: by_rows(split[1]) + by_channels(max(0, gone - split[1])))[0]


def _curve(costs: dict[str, Any], kind: str) -> PchipInterpolator:
    """Nats by parameters gone, through what was measured and nothing for nothing."""
    points = sorted((each["parameters_gone"], each["nats"]) for key, each in costs.items() if key.startswith(kind))
    gone, nats = zip((0, 0.0), *points, strict=True)
    return PchipInterpolator(gone, nats)


if __name__ == "__main__":
    main()
