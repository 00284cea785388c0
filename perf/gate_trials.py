"""How often the gate is wrong: an engine against itself, and against one that is faster for a real reason.

    python perf/gate_trials.py smollm2-135m --work W [--same 40] [--slower 20]

The faster engines have some layers fewer, so that the whole one is slower by about a tenth and a twentieth; how much it
really is stands beside the verdicts. Goes on where the result file ends: ``perf/results/gate-trials.json``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from flabc.runtime.measure.environment import environment

RESULTS = Path(__file__).resolve().parent / "results" / "gate-trials.json"

#: Layers that the faster engine lacks, and the seconds that a run may take.
CASES = {"same": (0, 120), "a tenth": (4, 120), "a twentieth": (2, 300)}

#: What may rise, and by how much.
SPEED = {"tpot_ms": 0.02}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--work", type=Path, default=Path("build/gate-trials"))
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--same", type=int, default=40, help="runs of the engine against itself")
    parser.add_argument("--slower", type=int, default=20, help="runs against each faster engine")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    whole = engine(asked.model, 0, asked.work, asked.precision)
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"trials": {}}
    for case, (layers, budget_s) in CASES.items():
        against = engine(asked.model, layers, asked.work, asked.precision)
        gates = asked.work / f"{budget_s}.yaml"
        gates.write_text(yaml.safe_dump({"budget_s": budget_s, "speed": SPEED, "parity": False}))
        trials = found["trials"].setdefault(case, [])
        while len(trials) < (asked.slower if layers else asked.same):
            trials.append(trial(whole, against, gates))
            found["environment"] = environment()
            RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


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
        **{name: said[name] for name in ("pairs", "disturbed", "seconds")},
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
