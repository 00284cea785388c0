"""The gate on real engines: one with more layers is caught, one against itself is not, and files are what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner, Result

from flabc import api, gating
from flabc.cli import cli
from flabc.errors import ArtifactError, EngineError, FlabcError, UsageError
from flabc.perf.gates import Gates, QualityGate
from flabc.runtime.measure import environment, stored
from flabc.runtime.measure.foreign import ForeignLoad
from flabc.runtime.measure.pairs import Pair, measured_openings
from flabc.runtime.measure.process import Process
from flabc.runtime.measure.result import Sample, Workload
from flabc.runtime.measure.roofline import measure_roofline
from flabc.runtime.measure.stored import Baseline

from .conftest import write_tiny

#: Runs are short, tests share their machine with others, and a tiny engine's times are mostly overhead.
CONFIG = {
    "workload": {"prompt_tokens": 16, "output_tokens": 8, "rounds": 2},
    "budget_s": 60,
    "max_foreign_cores": 64,
    "speed": {"total_ms": 0.25},
    "size": {"parameters": 0.1},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "gates.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture(scope="module")
def slow_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense tiny engine, but with four times as many layers."""
    folder = tmp_path_factory.mktemp("slow")
    api.export(write_tiny(folder / "model", "qwen2-tied", num_hidden_layers=12), folder / "engine")
    return folder / "engine"


@pytest.fixture
def few_openings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines for tests are of two processes."""
    monkeypatch.setattr(gating, "STORED_OPENINGS", 2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["gate", *map(str, arguments)])


def test_more_layers_are_caught(slow_engine: Path, tiny_dense_engine: Path, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "verdict"
    given = ("--candidate", slow_engine, "--against", tiny_dense_engine, "--gates", config)
    found = run("run", *given, "-o", out)
    assert found.exit_code == 1, found.output
    content = json.loads((out / "gate.json").read_text())
    checks = {check["metric"]: check for check in content["checks"]}
    assert {name: check["outcome"] for name, check in checks.items()} == {
        "parity": "pass",
        "parameters": "fail",
        "total_ms": "fail",
    }
    assert checks["total_ms"]["ratio"] > 1.5
    assert checks["total_ms"]["samples"] == len(content["timed"]["openings"]) >= 8
    assert (out / "junit.xml").read_text().count("<failure") == 2
    assert "❌ fail" in found.stdout


def test_fewer_layers_pass(slow_engine: Path, tiny_dense_engine: Path, config: Path) -> None:
    found = run("run", "--candidate", tiny_dense_engine, "--against", slow_engine, "--gates", config, "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["verdict"] == "pass"


@pytest.mark.usefixtures("few_openings")
def test_a_baseline_of_another_day(tiny_dense_engine: Path, config: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    wide = Gates.model_validate(
        {**CONFIG, "speed": {"tpot_ms": 20.0, "ttft_ms": 20.0}, "size": {"bytes_on_disk": 0.01}}
    )
    made = gating.baseline(tiny_dense_engine, file, config=wide)
    assert Baseline.read(file) == made
    assert len(made.openings) == 2
    runs = [run for opening in made.openings for twice in opening for run in twice]
    assert all(run.ttft_ms > 1 for run in runs)  # nothing is faster than the roofline
    same = gating.run(tiny_dense_engine, file, config=wide)
    assert same.verdict == "pass"
    assert {check.metric: check.unit for check in same.checks if check.kind == "speed"} == {
        "tpot_ms": "x roofline",
        "ttft_ms": "x roofline",
    }
    (first, *_), *_ = made.openings
    faster = tuple(run.model_copy(update={"token_ms": tuple(token / 1000 for token in run.token_ms)}) for run in first)
    file.write_text(made.model_copy(update={"openings": ((faster,),)}).model_dump_json())
    outcomes = {check.metric: check.outcome for check in gating.run(tiny_dense_engine, file, config=wide).checks}
    assert outcomes == {"parity": "pass", "bytes_on_disk": "pass", "tpot_ms": "fail", "ttft_ms": "pass"}
    elsewhere = made.model_copy(update={"environment": {**made.environment, "cpu": "another"}})
    file.write_text(elsewhere.model_dump_json())
    with pytest.raises(EngineError, match="measured on another class of machine"):
        gating.run(tiny_dense_engine, file, config=wide)
    file.write_text(made.model_copy(update={"schema_version": 1}).model_dump_json())
    with pytest.raises(ArtifactError, match=r"another version\. Expected: schema_version 3\. Found: 1"):
        gating.run(tiny_dense_engine, file, config=wide)


@pytest.mark.usefixtures("few_openings")
def test_a_folder_has_a_baseline_for_each_class_of_machine(
    tiny_dense_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, few = tmp_path / "perf" / "baseline", Gates.model_validate({**CONFIG, "speed": {"tpot_ms": 20.0}})
    made = gating.baseline(tiny_dense_engine, folder, config=few)
    (own,) = folder.iterdir()
    assert own == gating.baseline_file(folder)
    assert own.suffix == ".json"
    assert f"-{os.cpu_count()}-cores-" in own.name
    for other in ("README.md", ".gitkeep"):
        (folder / other).write_text("who knows")
    (folder / "old.json").write_text('{"schema_version": 1, "other": "fields"}')
    assert Baseline.read(folder) == gating._stored(folder) == made
    # One name stands for several generations of processors: what they can do has to be the same.
    monkeypatch.setattr(environment, "cpu_features", lambda: ["sve"])
    with pytest.raises(EngineError, match=r"no baseline of this class of machine\. Expected: .*, sve") as told:
        gating.run(tiny_dense_engine, folder, config=few)
    assert made.machine_class in str(told.value)
    assert "old.json, which cannot be read" in str(told.value)
    other = made.model_copy(update={"environment": {**made.environment, "cpu_features": ["sve"]}})
    (folder / "a.json").write_text(other.model_dump_json())
    assert Baseline.read(folder) == other
    (folder / "b.json").write_text(other.model_dump_json())
    with pytest.raises(ArtifactError, match=r"several baselines of this class.*Found: a\.json, b\.json"):
        Baseline.read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EngineError, match=r"Found: no baseline\."):
        gating.run(tiny_dense_engine, tmp_path / "empty", config=few)


def test_a_folder_without_a_manifest_is_a_broken_engine(tiny_dense_engine: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_dense_engine, tmp_path / "engine")
    (tmp_path / "engine" / "flabc.json").unlink()
    with pytest.raises(ArtifactError, match="not a flabc artifact"):
        gating.run(tiny_dense_engine, tmp_path / "engine", config=Gates.model_validate(CONFIG))


def test_quality_is_compared_with_the_other_engine(tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path) -> None:
    strict = Gates.model_validate(
        {"quality": {"perplexity": {"max_worse": 1e-6, "limit": 4}, "kl": {"max_value": 1e-6, "limit": 4}}}
    )
    found = gating.run(tiny_engine, tiny_dense_engine, config=strict)
    assert [check.kind for check in found.checks] == ["parity", "quality", "quality"]
    assert found.checks[2].outcome == "fail"  # random weights, cut: they say something else
    itself = gating.run(tiny_dense_engine, tiny_dense_engine, config=strict)
    assert itself.verdict == "pass"
    (tmp_path / "b.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is no baseline"):
        gating.run(tiny_engine, tmp_path / "b.json", config=strict)


@pytest.mark.usefixtures("few_openings")
def test_a_baseline_has_no_answers(tiny_dense_engine: Path, tmp_path: Path) -> None:
    few = Gates.model_validate({**CONFIG, "speed": {"tpot_ms": 20.0}})
    gating.baseline(tiny_dense_engine, tmp_path / "b.json", config=few)
    asked = few.model_copy(
        update={"quality": Gates.model_validate({"quality": {"perplexity": {"max_worse": 1}}}).quality}
    )
    with pytest.raises(UsageError, match="holds no answers"):
        gating.run(tiny_dense_engine, tmp_path / "b.json", config=asked)


def test_a_worker_that_dies_halfway_is_no_regression(
    tiny_dense_engine: Path, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measured, left = Process.run, iter((True, True, True))

    def run_and_die(process: Process, text: str, workload: Workload) -> Sample:
        if not next(left, False):
            process.kill()
        return measured(process, text, workload)

    monkeypatch.setattr(Process, "run", run_and_die)
    out = tmp_path / "verdict"
    given = ("--candidate", tiny_dense_engine, "--against", tiny_dense_engine, "--gates", config)
    found = run("run", *given, "-o", out)
    assert isinstance(found.exception, EngineError)
    assert "died" in str(found.exception)
    assert found.exception.exit_code == 3
    assert not out.exists()


def test_a_failure_to_judge_is_no_regression(tiny_dense_engine: Path, tmp_path: Path) -> None:
    too_long = {"workload": {"prompt_tokens": 8, "output_tokens": 600}, "speed": {"tpot_ms": 0.1}}
    for content, candidate, code in (
        ({"speed": {"tpot": 0.1}}, tiny_dense_engine, 2),
        ({"size": {"parameters": 0.1}}, tmp_path, 2),
        (too_long, tiny_dense_engine, 3),
    ):
        (tmp_path / "gates.yaml").write_text(yaml.safe_dump(content))
        found = run("run", "--candidate", candidate, "--against", tiny_dense_engine, "--gates", tmp_path / "gates.yaml")
        assert isinstance(found.exception, FlabcError)
        assert found.exception.exit_code == code


def test_noise_refuses_limits_below_it(
    tiny_dense_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = gating.prompts("python-stdlib", Workload.model_validate(CONFIG["workload"]))
    stream = measured_openings(tiny_dense_engine, tiny_dense_engine, Workload.model_validate(CONFIG["workload"]), texts)
    measured = [next(stream) for _ in range(8)]
    monkeypatch.setattr(gating, "measured_openings", lambda *_: iter(measured))
    for limit, code, sign in ((1e-9, 3, "TOO TIGHT"), (50.0, 0, "ok")):
        file = tmp_path / "gates.yaml"
        file.write_text(yaml.safe_dump({**CONFIG, "budget_s": 1e-9, "speed": {"total_ms": limit}}))
        found = run("noise", tiny_dense_engine, "--gates", file)
        assert found.exit_code == code, found.output
        assert sign in found.stdout
        assert "in 8 openings" in found.stderr


def test_noise_is_given_up_where_others_never_rest(
    tiny_dense_engine: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_once = Sample(ttft_ms=1.0, token_ms=(1.0,))
    busy = Pair(baseline=(run_once, run_once), candidate=(run_once, run_once), foreign_cores=99.0)
    monkeypatch.setattr(gating, "measured_openings", lambda *_: repeat((busy, busy)))
    found = run("noise", tiny_dense_engine, "--gates", config)
    assert isinstance(found.exception, EngineError)
    assert "Others use this machine all the time" in str(found.exception)
    assert found.exception.exit_code == 3


@pytest.mark.usefixtures("few_openings")
def test_a_baseline_is_given_up_where_others_never_rest(
    tiny_dense_engine: Path, config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_once = Sample(ttft_ms=1.0, token_ms=(1.0,))
    monkeypatch.setattr(stored, "_openings", lambda *_: repeat([((run_once, run_once), 99.0)]))
    with pytest.raises(EngineError, match="Others use this machine all the time") as told:
        gating.baseline(tiny_dense_engine, tmp_path / "b.json", config=config)
    assert "99.0" in str(told.value)
    assert not (tmp_path / "b.json").exists()


@pytest.mark.usefixtures("few_openings")
def test_what_quality_cannot_be_is_told_before_anything_is_timed(
    tiny_dense_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Gates.model_validate({**CONFIG, "speed": {"tpot_ms": 20.0}})
    gating.baseline(tiny_dense_engine, tmp_path / "b.json", config=few)

    def timed(*_: object) -> None:
        pytest.fail("timed")

    monkeypatch.setattr(gating, "_speeds", timed)
    written = few.model_copy(update={"quality": {"humaneval": QualityGate(min_value=0.1)}})
    with pytest.raises(UsageError, match="runs code that a model wrote"):
        gating.run(tiny_dense_engine, tiny_dense_engine, config=written)
    compared = few.model_copy(update={"quality": {"kl": QualityGate(max_value=0.1)}})
    with pytest.raises(UsageError, match="holds no answers"):
        gating.run(tiny_dense_engine, tmp_path / "b.json", config=compared)


@pytest.mark.usefixtures("few_openings")
def test_a_baseline_goes_where_it_is_told_and_replaces_nothing_unasked(
    tiny_dense_engine: Path, config: Path, tmp_path: Path
) -> None:
    file = tmp_path / "perf" / "baseline" / "engine.json"
    given = ("baseline", tiny_dense_engine, "--gates", config, "-o", file)
    assert run(*given).exit_code == 0
    before = file.read_bytes()
    again = run(*given)
    assert isinstance(again.exception, ArtifactError)
    assert "--force" in str(again.exception)
    assert file.read_bytes() == before


def test_a_fault_of_ours_is_no_verdict(config: Path) -> None:
    code = "from flabc import cli, gating; gating.run = lambda *_, **__: 1 / 0; cli.main()"
    words = ["gate", "run", "--candidate", "a", "--against", "b", "--gates", str(config)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 3
    assert "Unexpected ZeroDivisionError" in done.stderr


def test_a_baseline_is_not_made_of_a_gpu(tiny_dense_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Process, "on_gpu", True)
    with pytest.raises(EngineError, match="runs on a GPU"):
        gating.baseline(tiny_dense_engine, "b.json", config=Gates.model_validate(CONFIG))


def test_a_process_that_ends_meanwhile_is_no_error() -> None:
    short = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    with ForeignLoad([short.pid]) as foreign:
        short.communicate("\n")
    assert foreign.cores >= 0


def test_foreign_load_is_what_others_do() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with ForeignLoad([]) as all_others, ForeignLoad([busy.pid]) as without_it:
            time.sleep(2)
            taken = sum(psutil.Process(busy.pid).cpu_times()[:2])
        assert taken > 0.2
        assert all_others.cores - without_it.cores == pytest.approx(taken / 2, abs=0.25)
    finally:
        busy.kill()
        busy.wait()


def test_a_roofline_is_of_this_world() -> None:
    found = measure_roofline()
    assert 0.5 < found.bandwidth_gib_s < 2000
    assert 1 < found.gflops < 100_000
