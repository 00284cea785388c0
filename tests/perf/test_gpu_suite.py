"""The GPU suite on a processor, with tiny shapes: its files, its budget, its resuming, and what it needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flabc import api
from flabc.errors import EngineError, ParityError, UsageError
from flabc.perf import gpu_check, gpu_plots, gpu_suite
from flabc.perf.gpu_engines import EngineResult
from flabc.perf.gpu_plan import Budget, foretold_s, planned, specs_of
from flabc.perf.gpu_run import Suite, SuiteState, results
from flabc.runtime.measure.result import Workload
from flabc.runtime.measure.shape_result import DeviceRoofline

ROOT = Path(__file__).parents[2]
SMALL = ["--cpu", "--prompt-tokens", "6", "--output-tokens", "4", "--rounds", "1", "--no-energy"]

#: Lets flabc import only what a source tree may ask for; what transformers wants for itself is its own affair.
WALL = """
import runpy, sys

MAY = {"torch", "transformers", "numpy", "pydantic", "psutil", "yaml", "tokenizers", "safetensors"}

class Wall:
    def find_spec(self, name, path=None, target=None):
        frame, top = sys._getframe(1), name.split(".")[0]
        while frame.f_globals.get("__name__", "").startswith("importlib") or "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asks = frame.f_globals.get("__name__", "").split(".")[0]
        if top == "matplotlib" or asks == "flabc" and top not in MAY | {"flabc"} | sys.stdlib_module_names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Wall())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def suite(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Run it here; how many cells failed, and its table of contents."""
    torch.set_num_threads(1)
    asked = vars(gpu_suite._parser().parse_args(["-o", str(folder), *SMALL, *words]))
    failed = Suite(folder, asked).run()
    found: dict[str, Any] = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    return failed, found


def test_it_runs_from_a_source_tree_with_little_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WALL, str(ROOT / "perf" / "gpu_suite.py"), "-o", str(tmp_path), *SMALL]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--pair", "tiny:flab-22", "--batch", "2"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    state = SuiteState.model_validate_json((tmp_path / "suite.json").read_text(encoding="utf-8"))
    assert [cell.status for cell in state.cells] == ["measured"]
    assert state.check["tokens"] == gpu_check.STEPS
    assert state.drawings is not None
    assert "none: This needs the package 'matplotlib'" in state.drawings
    (result,) = results(tmp_path)
    assert result.dense.energy.missing == "it was not asked for"


def test_it_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = ["--pair", "tiny:flab-22", "--pair", "tiny:self-pruner-49b-uneven"]
    failed, first = suite(tmp_path, *pairs, "--batch", "1", "--budget", "1h")
    assert (failed, [cell["status"] for cell in first["cells"]]) == (0, ["measured", "measured"])
    assert {file.name for file in tmp_path.glob("*.svg")} == {"throughput.svg"}  # no counter, no GPU
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cells").glob("*.json")}
    (tmp_path / "cells" / "tiny.flab-22.b1.p6.json").write_text("{")  # as if cut off, were it not renamed when whole
    failed, second = suite(tmp_path, *pairs, "--batch", "1,2", "--budget", "1h")
    assert [cell["status"] for cell in second["cells"]] == ["measured"] * 4
    kept = tmp_path / "cells" / "tiny.self-pruner-49b-uneven.b1.p6.json"
    assert kept.stat().st_mtime_ns == before[kept]
    assert len(list(results(tmp_path))) == 4
    points = gpu_plots.curves("throughput", list(results(tmp_path)))
    assert [[point[0] for point in curve] for curve in points.values()] == [[1, 2], [1, 2]]
    monkeypatch.setattr("flabc.runtime.measure.environment.cpu_name", lambda: "another")
    with pytest.raises(EngineError, match=r"another machine.*Choose another folder"):
        suite(tmp_path, *pairs)


def test_what_the_budget_cannot_hold_is_skipped_and_says_why(tmp_path: Path) -> None:
    _, found = suite(
        tmp_path, "--pair", "tiny:flab-22", "--pair", "llama-2-70b:self-pruner-49b", "--batch", "1", "--budget", "1s"
    )
    assert {cell["status"] for cell in found["cells"]} == {"skipped"}
    assert all("s of the budget are left" in cell["reason"] for cell in found["cells"])


def test_a_cell_that_fails_is_written_down_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flabc.perf import gpu_run

    true = gpu_run.measure_pair

    def measure(machine: Any, pair: Any, workload: Workload, **how: Any) -> Any:
        if workload.batch == 1:
            raise RuntimeError("CUDA error")
        return true(machine, pair, workload, **how)

    monkeypatch.setattr(gpu_run, "measure_pair", measure)
    failed, found = suite(tmp_path, "--pair", "tiny:flab-22", "--batch", "1,2", "--budget", "1h")
    assert failed == 1
    assert [cell["status"] for cell in found["cells"]] == ["failed", "measured"]
    assert found["cells"][0]["reason"] == "RuntimeError: CUDA error"


def test_a_real_model_is_measured_with_its_own_weights(tmp_path: Path, tiny: Any) -> None:
    dense, other = tiny("qwen2-tied"), tiny("qwen2-untied")
    failed, _ = suite(tmp_path, "--model", str(dense), "--pruned", str(other), "--batch", "1", "--budget", "1h")
    (result,) = results(tmp_path)
    assert failed == 0
    assert (result.dense.weights, result.pruned.weights) == (dense.name, other.name)
    assert result.pruned.spec.num_parameters > result.dense.spec.num_parameters


def test_engines_are_measured_beside_and_a_fault_is_told(tmp_path: Path, tiny: Any) -> None:
    engine = tmp_path / "engine"
    api.export(tiny("qwen2-tied"), engine)
    words = ["--pair", "tiny:flab-22", "--batch", "1,2", "--budget", "0s", "--engine", str(engine)]
    _, found = suite(tmp_path / "out", *words, str(engine))
    measured = EngineResult.model_validate_json((tmp_path / "out" / found["engines"]).read_text(encoding="utf-8"))
    assert measured.backends == ("onnxruntime", "onnxruntime")
    assert [(cell.batch, len(cell.baseline), len(cell.candidate)) for cell in measured.cells] == [(1, 2, 2), (2, 2, 2)]
    assert all(len(run.token_ms) == 3 for cell in measured.cells for run in cell.candidate)
    _, found = suite(tmp_path / "out", *words, str(tmp_path / "none"))
    assert found["engines"].startswith("none: ")


def test_without_a_gpu_nothing_is_measured_unless_that_is_asked_for(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a CUDA device here")
    asked = vars(gpu_suite._parser().parse_args(["-o", str(tmp_path)]))
    with pytest.raises(UsageError, match="no CUDA device"):
        Suite(tmp_path, asked).run()


def test_a_decoder_that_says_something_else_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from flabc.runtime.backends import decoder_parts

    true = decoder_parts._gated
    monkeypatch.setattr(decoder_parts, "EAGER", decoder_parts.EAGER)
    wrong = decoder_parts.Parts(decoder_parts._normed, decoder_parts._turned, lambda wide: true(wide) * 1.01)
    monkeypatch.setattr("flabc.runtime.backends.static_decoder.EAGER", wrong)
    with pytest.raises(ParityError, match="nothing was measured"):
        gpu_check.check_decoder(torch.device("cpu"), graphs=False)


def test_the_plan_has_the_goal_first_and_all_that_was_promised() -> None:
    cells = planned()
    assert [(cell.shape, cell.cut) for cell in cells[:2]] == [
        ("llama-2-70b", "self-pruner-49b"),
        ("llama-2-70b", "self-pruner-35b"),
    ]
    assert {cell.batch for cell in cells} == {1, 2, 4, 8, 16, 32, 64}
    assert {cell.prompt_tokens for cell in cells} >= {128, 512, 1024, 4096}
    assert len({cell.name for cell in cells}) == len(cells)
    fast = DeviceRoofline(bandwidth_gib_s=2500, gflops=6e5, dtype="bfloat16")
    goal = foretold_s(specs_of(cells[0]), cells[0].workload(128, 3), fast, 0.25, energy=True)
    assert 20 < goal < 120  # so that ten minutes hold the goal and the families


def test_a_budget_learns_from_what_was_spent() -> None:
    budget = Budget(100)
    assert budget.expected_s(10) == 10
    budget.spend(30, foretold=10)
    assert (budget.left_s, budget.expected_s(10)) == (70, 30)
    budget.spend(80)
    assert budget.left_s == 0


def test_a_budget_that_is_no_time_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.seconds("10m") == 600
    with pytest.raises(SystemExit):
        gpu_suite.main(["-o", "out", "--budget", "10"])
    assert "'10' is no time; expected a number and s, m or h" in capsys.readouterr().err
