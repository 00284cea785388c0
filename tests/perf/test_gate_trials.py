"""How trials of the gate are told."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import psutil
import pytest

from flabc.perf import gate_trials


def trial(verdict: str, ratio: float | None, seconds: float, disturbed: int = 0) -> dict[str, Any]:
    return {"verdict": verdict, "ratio": ratio, "seconds": seconds, "disturbed": disturbed, "pairs": 8}


def test_verdicts_are_counted_for_each_case_that_was_tried() -> None:
    trials = {
        "same": [trial("pass", 1.001, 14), trial("fail", 1.04, 20), trial("pass", 0.99, 103, 2)],
        "loaded": [trial("undecided", None, 120, 30)],
    }
    lines = gate_trials.as_markdown(
        {"trials": trials, "environment": {"cpu": "Tested", "logical_cores": 2}}
    ).splitlines()
    assert lines[2] == "| itself | 3 | 2 | 1 | 0 | 1.001 (0.990 to 1.040) | 20 (14 to 103) | 2 |"
    assert lines[3].endswith("| 1 | 0 | 0 | 1 | - | 120 (120 to 120) | 30 |")
    assert len(lines) == 6
    assert "Tested, 2 cores" in lines[-1]


def test_the_other_process_begins_late_and_ends_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_trials, "LOAD_AFTER_S", 0.3)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def note(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", note)
    with gate_trials.load():
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1.5)"], check=True)
        worked = psutil.Process(started[0].pid).cpu_times().user
    assert worked > 0.3
    assert started[0].poll() is not None
