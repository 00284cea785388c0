"""How often the gate is wrong: an engine against itself, and against one that is faster for a real reason.

    python perf/gate_trials.py smollm2-135m --work W [--cases same loaded]

The faster engines have some layers fewer, so that the whole one is slower by about a tenth and a twentieth; how much it
really is stands beside the verdicts. Goes on where the result file ends: ``perf/results/gate-trials.json``. The machine
should have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from flabc.runtime.measure.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "gate-trials.json"


@dataclass(frozen=True)
class Case:
    """What the gate is tried on.

    Args:
        title: as the table shows it.
        layers: that the other engine lacks.
        budget_s: seconds that a run may take.
        runs: how many.
        loaded: whether another process keeps a core busy from ``LOAD_AFTER_S`` to the end of the run.
    """

    title: str
    layers: int
    budget_s: int
    runs: int
    loaded: bool = False


CASES = {
    "same": Case("itself", 0, 120, 40),
    "a tenth": Case("itself without four layers", 4, 120, 20),
    "a twentieth": Case("itself without two layers", 2, 300, 20),
    "loaded": Case("itself, while another process begins to work", 0, 120, 10, loaded=True),
}

#: When the other process begins: halfway to the earliest decision.
LOAD_AFTER_S = 40

#: Keeps one core busy.
LOAD = "while True: pass"

#: What may rise, and by how much.
SPEED = {"tpot_ms": 0.02}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--work", type=Path, default=Path("build/gate-trials"))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    whole = engine(asked.model, 0, asked.work, asked.precision)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"trials": {}}
    for name in asked.cases:
        case = CASES[name]
        against = engine(asked.model, case.layers, asked.work, asked.precision)
        gates = asked.work / f"{case.budget_s}.yaml"
        gates.write_text(yaml.safe_dump({"budget_s": case.budget_s, "speed": SPEED, "parity": False}))
        trials = found["trials"].setdefault(name, [])
        while len(trials) < case.runs:
            with load() if case.loaded else nullcontext():
                trials.append(trial(whole, against, gates))
            found["environment"] = environment()
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def as_markdown(found: Mapping[str, Any]) -> str:
    """The verdicts of each case, and how much slower the engine was measured to be."""
    lines = [
        "| an engine against | runs | pass | fail | undecided | time per token, ratio | seconds | disturbed pairs |",
        "| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, case in CASES.items():
        if trials := found["trials"].get(name):
            verdicts = Counter(each["verdict"] for each in trials)
            lines.append(
                f"| {case.title} | {len(trials)} | {verdicts['pass']} | {verdicts['fail']} | {verdicts['undecided']} "
                f"| {_span(trials, 'ratio', '.3f')} | {_span(trials, 'seconds', '.0f')} "
                f"| {sum(each['disturbed'] for each in trials)} |"
            )
    machine = found["environment"]
    where = (
        f"Measured on {machine['cpu']}, {machine['logical_cores']} cores; median and range of the runs. Time per token "
        f"may rise by {SPEED['tpot_ms']:.0%}."
    )
    return "\n".join([*lines, "", where])


def _span(trials: Sequence[Mapping[str, Any]], field: str, shape: str) -> str:
    # A run all of whose pairs were disturbed has no ratio.
    values = [each[field] for each in trials if each[field] is not None]
    return f"{median(values):{shape}} ({min(values):{shape}} to {max(values):{shape}})" if values else "-"


@contextmanager
def load() -> Iterator[None]:
    """Another process that works, from some seconds on until the end."""
    begin = f"import time; time.sleep({LOAD_AFTER_S})\n{LOAD}"
    other = subprocess.Popen([sys.executable, "-c", begin])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def engine(model: str, layers: int, work: Path, precision: str) -> Path:
    """The engine of a model without so many of its layers."""
    out = work / f"without-{layers}"
    if out.exists():
        return out
    source = model
    if layers:
        recipe, source = work / f"without-{layers}.yaml", str(work / f"checkpoint-{layers}")
        stage = {"stage": "layers", "count": layers, "criterion": "bi", "order": "one_shot", "sequences": 4}
        recipe.write_text(yaml.safe_dump({"name": "fewer", "calibration": {"sequences": 4}, "stages": [stage]}))
        flabc("compress", model, "--recipe", recipe, "-o", source, "--force")
    flabc("export", source, "-o", out, "--precision", precision)
    return out


def trial(candidate: Path, against: Path, gates: Path) -> dict[str, Any]:
    """One run of the gate."""
    done = flabc("gate", "run", "--candidate", candidate, "--against", against, "--gates", gates, "--json")
    said = json.loads(done)
    (check,) = said["checks"]
    return {
        "verdict": said["verdict"],
        "ratio": check["ratio"],
        "interval": check["interval"],
        **{name: said[name] for name in ("openings", "pairs", "disturbed", "seconds")},
    }


def flabc(*arguments: object) -> str:
    """Standard output of a command; of a gate whatever its verdict.

    Raises:
        subprocess.CalledProcessError: if it failed.
    """
    command = [sys.executable, "-m", "flabc", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    judged = arguments[0] == "gate" and done.stdout
    if done.returncode and not judged:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


if __name__ == "__main__":
    main()
