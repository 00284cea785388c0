"""The command line, run as a person runs it: as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from flabc.artifact import sha256
from flabc.cli import cli

FLABC = [sys.executable, "-c", "from flabc.cli import main; main()"]


def flabc(*arguments: str | Path, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [*FLABC, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, input=stdin, timeout=600)


def test_help_is_instant_and_loads_nothing_heavy() -> None:
    code = "import sys; from flabc.cli import main\ntry: main()\nexcept SystemExit: print(sorted(sys.modules))"
    times = []
    for _ in range(5):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
        times.append(time.perf_counter() - started)
    for module in ("'torch'", "'transformers'", "'onnxruntime'", "'numpy'", "'pydantic'"):
        assert module not in done.stdout
    assert min(times) < 0.3


@pytest.mark.parametrize("command", list(cli.commands))
def test_every_command_has_help(command: str) -> None:
    done = flabc(command, "--help")
    assert done.returncode == 0
    assert command in done.stdout
    assert "Traceback" not in done.stderr


def leaves(group: click.Group) -> Iterator[click.Command]:
    """Every command that does something."""
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from leaves(command)
        else:
            yield command


@pytest.mark.parametrize("command", list(leaves(cli)), ids=lambda command: command.name)
def test_every_command_takes_json(command: click.Command) -> None:
    assert any(option.name == "as_json" for option in command.params)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["comprss"], 2, "Did you mean 'compress'"),
        (["gate", "nose"], 2, "Did you mean 'noise'"),
        (["compress", "x", "--bogus"], 2, "--bogus"),
        (["compress"], 2, "flabc init"),
        (["compress", "smollm2-135m", "-o", "p", "--recipe", "flab22"], 1, "Did you mean 'flab-22'"),
        (["compress", "x", "--memory", "much"], 2, "'much' is no size; expected a number and a unit, e.g. 6GiB"),
        (["inspect", "smollm2-135"], 1, "Did you mean 'smollm2-135m'"),
        (["eval", "x", "--task", "perplexty"], 1, "Did you mean 'perplexity'"),
        (["run", "nowhere", "hello"], 1, "is no model"),
        (["bench", "a", "--baseline", "b", "-o", "c"], 1, "not a flabc artifact"),
        (["run", "e", "x", "--temperature", "-1"], 2, "These options do not fit: temperature: "),
        (["run", "def is_prime(n):"], 2, "There is no folder 'def is_prime(n):'. Expected: ENGINE and PROMPT"),
        (["bench", "--shape", "llama-2-70b", "--provider", "cpu"], 2, "--provider says nothing of a shape"),
        (["recipes", "flab"], 1, "Did you mean"),
    ],
)
def test_what_is_wrong_is_told_in_a_paragraph(tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    done = flabc(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_an_error_with_json_is_one_object_too(tmp_path: Path) -> None:
    done = flabc("inspect", "nowhere", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert "Unknown model" in json.loads(done.stdout)["error"]


def test_a_fault_of_ours_is_no_traceback_unless_asked(tmp_path: Path) -> None:
    code = "from flabc import api, cli; api.doctor = lambda: 1 / 0; cli.main()"
    environment = os.environ | {"FLABC_TRACEBACK": ""}
    command = [sys.executable, "-c", code, "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "Traceback" not in done.stderr
    asked = subprocess.run(command, capture_output=True, text=True, env=environment | {"FLABC_TRACEBACK": "1"})
    assert "Traceback" in asked.stderr


def test_the_project_file_stands_in_for_every_argument(tiny: object, tiny_recipe: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")  # type: ignore[operator]
    for arguments in (
        ["init", "--model", model, "--recipe", tiny_recipe],
        ["compress"],
        ["export"],
        ["bench", "--prompt-tokens", "8", "--output-tokens", "4", "--openings", "2", "--rounds", "1"],
        ["run", "engine", "def f(x):", "--max-tokens", "5"],
    ):
        done = flabc(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        ".flabc.schema.json",
        "dense-engine",
        "engine",
        "flabc.yaml",
        "pruned",
        "report",
    }
    again = flabc("compress", cwd=tmp_path)
    assert again.returncode == 1
    assert "--force" in again.stderr
    other = flabc("export", "-o", "another", cwd=tmp_path)  # the dense engine is in the way
    assert (other.returncode, (tmp_path / "another").exists()) == (1, False)
    assert "dense-engine" in other.stderr
    made = json.loads((tmp_path / "dense-engine" / "flabc.json").read_text())["source"]
    assert made["files"]["model.safetensors"] == sha256(Path(model) / "model.safetensors")
    engine = flabc("export", "engine", "-o", "again", cwd=tmp_path)
    assert engine.returncode == 2
    assert "engine is an engine. Expected: a checkpoint" in engine.stderr


def test_bench_measures_loads(tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path) -> None:
    small = ["--prompt-tokens", "8", "--output-tokens", "4", "--openings", "1", "--rounds", "1"]
    small += ["--requests", "6", "--max-batch", "3"]
    loads = ["--concurrency", "1,4", "--arrival-rate", "50,100.5"]
    command = ["bench", tiny_engine, "--baseline", tiny_dense_engine, *small, *loads, "-o", tmp_path / "report"]
    done = flabc(*command, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["load"]
    assert [(row["concurrency"], row["arrival_rate"], row["side"]) for row in rows] == [
        (clients, rate, side)
        for clients, rate in ((1, None), (4, None), (None, 50), (None, 100.5))
        for side in ("dense", "pruned")
    ]
    assert [row["requests"] for row in rows] == [12, 12, 16, 16, 12, 12, 12, 12]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(4 * row["requests_per_s"])
        low, high = row["latency_intervals_ms"]["p50"]
        assert 0 < low <= row["latency_ms"]["p50"] <= high
    raw = json.loads((tmp_path / "report" / "bench.json").read_text())["load"]["cells"]
    assert [len(cell["candidate"]) for cell in raw] == [2] * 4
    assert len(raw[1]["baseline"][0]["requests"]) == 8 + raw[1]["baseline"][0]["warmup_requests"] == 12
    assert "100.5 requests/s come" in (tmp_path / "report" / "report.md").read_text()
    again = flabc(*command, "--force")
    assert again.returncode == 0, again.stderr
    assert "Under load" in again.stdout


def test_a_suite_says_what_is_measured_where_no_option_does(
    tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path
) -> None:
    lengths, loads = "prompt_tokens: [8, 6]\nbatch: [2]\noutput_tokens: 4\n", "arrival_rate: [50.5]\nrequests: 4\n"
    (tmp_path / "mine.yaml").write_text(f"{lengths}rounds: 1\nopenings: 2\n{loads}")
    command = ["bench", tiny_engine, "--baseline", tiny_dense_engine, "--suite", "mine.yaml", "-o", "report"]
    done = flabc(*command, "--output-tokens", "3", "--budget", "5m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "report" / "bench.json").read_text())
    asked = {"prompt_tokens": 8, "batch": 2, "output_tokens": 3, "rounds": 1, "threads": None, "provider": "auto"}
    assert found["workload"] == asked
    assert [(cell["prompt_tokens"], cell["batch"]) for cell in found["sweep"]] == [(6, 2)]
    assert [cell["arrival_rate"] for cell in found["load"]["cells"]] == [50.5]
    assert found["load"]["plan"]["requests"] == 4
    assert {sample["opening"] for sample in found["baseline"]["samples"]} == {0, 1}


def test_an_unknown_suite_and_a_wrong_budget_are_refused() -> None:
    done = flabc("bench", "e", "--suite", "completoin")
    assert done.returncode == 1
    assert "Did you mean 'completion'" in done.stderr
    done = flabc("bench", "e", "--budget", "5")
    assert done.returncode == 2
    assert "expected a number and s, m or h" in done.stderr
    for name in ("quick", "completion"):
        done = flabc("bench", "--shape", "llama-2-70b", "--suite", name)
        assert done.returncode == 2
        assert "--suite says nothing of a shape" in done.stderr


@pytest.mark.parametrize("wrong", ["0", "1,x", "", "1,,2", "-1", "inf", "nan"])
def test_rates_that_are_none_are_refused(wrong: str) -> None:
    done = flabc("bench", "e", "--arrival-rate", wrong)
    assert done.returncode == 2
    assert "numbers above 0" in done.stderr


def test_a_shape_has_no_load() -> None:
    done = flabc("bench", "--shape", "llama-2-70b", "--concurrency", "2")
    assert done.returncode == 2
    assert "--shape stands alone" in done.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["recipes"], ["recipes", "flab-22"], ["run"], ["eval"], ["inspect"]])
def test_json_is_all_that_stdout_holds(arguments: list[str], tiny_engine: Path, tiny_checkpoint: Path) -> None:
    targets = {"run": [tiny_engine, "def"], "eval": [tiny_engine], "inspect": [tiny_checkpoint]}
    done = flabc(*arguments, *targets.get(arguments[0], []), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)


def test_run_reads_stdin_and_streams_what_json_gives_whole(tiny_engine: Path) -> None:
    streamed = flabc("run", tiny_engine, "--max-tokens", "12", stdin="def f(x):")
    whole = json.loads(flabc("run", tiny_engine, "def f(x):", "--max-tokens", "12", "--json").stdout)
    assert streamed.stdout == "def f(x):" + whole["text"] + "\n"
    assert len(whole["token_ids"]) <= 12


def test_memory_is_given_with_its_unit(tiny: object, tiny_recipe: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")  # type: ignore[operator]
    done = flabc("compress", model, "--recipe", tiny_recipe, "-o", "out", "--memory", "512MiB", cwd=tmp_path)
    assert done.returncode != 0
    assert "Found: 0.5 GiB" in done.stderr
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_no_output(tiny: object, tiny_recipe: Path, tmp_path: Path) -> None:
    model = tiny("llama-tied")  # type: ignore[operator]
    command = [*FLABC, "compress", str(model), "--recipe", str(tiny_recipe), "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(3)  # past the imports, into the work
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the work was done before the signal came")
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = " ".join(
        ["exec", f"'{sys.executable}'", "-c", "'from flabc.cli import main; main()'", "recipes --schema | true"]
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize("wrong", ["0", "1,x", "", "1,,2", "-1"])
def test_numbers_that_are_none_are_refused(wrong: str) -> None:
    done = flabc("bench", "e", "--batch", wrong)
    assert done.returncode == 2
    assert "apart by commas" in done.stderr
