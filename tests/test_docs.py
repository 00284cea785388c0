"""The documents tell the truth: generated files are fresh, links lead somewhere, blocks run."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from flabc.commands.gate import gate
from flabc.perf.gates import Gates

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name
    for name in (
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
        *("docs/serving.md", "docs/gating.md", "docs/recovering.md"),
    )
]

#: Where the README serves.
ADDRESS = "127.0.0.1:8000"


def generator() -> ModuleType:
    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


def serves(block: str) -> bool:
    """Whether a block is about a server, which a test of its own runs."""
    return ADDRESS in block or "flabc serve" in block


def test_generated_documents_are_fresh() -> None:
    for file, content in generator().generated().items():
        assert file.read_text(encoding="utf-8") == content, f"run make docs: {file.name} is old"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_code_map_names_every_module() -> None:
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = [name for name in tracked.stdout.split() if not name.startswith(("tests/", "docs/"))]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in modules if f"`{name}`" not in text and not name.endswith("__init__.py")]
    assert not missing
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.chain
@pytest.mark.timeout(3600)  # minutes where the processor multiplies bfloat16, a quarter of an hour more where not
def test_the_readme_runs(tmp_path: Path) -> None:
    """Every bash block, in order, in one empty folder; then every Python block."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    commands = [block for block in blocks("bash") if "make " not in block and not serves(block)]
    assert commands
    for block in commands:
        done = subprocess.run(["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    for block in [block for block in blocks("python") if not serves(block)]:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
    _check_the_promise(tmp_path)
    _hold_the_demo_to_its_gates(tmp_path, environment)
    _hold_the_engine_to_its_baseline(tmp_path, environment)


def test_the_readme_serves(tiny_engine: Path, tmp_path: Path) -> None:
    """Its server, its curl line and its client, on a free port."""
    (tmp_path / "engine").symlink_to(tiny_engine)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    server, curl = (block for block in blocks("bash") if serves(block))
    (client,) = (block for block in blocks("python") if serves(block))
    started = f"exec {server.strip()} --port {address.split(':')[1]}"
    with subprocess.Popen(
        ["bash", "-euc", started], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            assert process.stdout is not None
            assert address.encode() in process.stdout.readline()
            for command in (
                ["bash", "-euc", curl.replace(ADDRESS, address)],
                [sys.executable, "-c", client.replace(ADDRESS, address)],
            ):
                done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                assert done.stdout.strip()
        finally:
            process.terminate()
    assert process.returncode == 0


def test_the_gate_that_is_shown_is_the_gate() -> None:
    """YAML that parses, commands whose options exist, and a table of the fields that there are."""
    text = (ROOT / "docs" / "gating.md").read_text(encoding="utf-8")
    shown = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", text, re.S | re.M)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text(encoding="utf-8"))
    called = shown[0]["jobs"]["gate"]
    assert set(called["with"]) <= set(workflow[True]["workflow_call"]["inputs"])  # YAML 1.1 reads "on" as true
    lines = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step] + shown[1]["gate"]["script"]
    runs = [line for line in lines if line.startswith("flabc gate run")]
    assert len(runs) == 2
    options = {option for parameter in gate.commands["run"].params for option in parameter.opts}
    for line in runs:
        assert {word for word in line.split() if word.startswith("-")} <= options
    fields = re.findall(r"^\| `(\w+)` \|", text, re.M)
    assert set(fields) == set(Gates.model_fields)
    readme = next(block for block in blocks("yaml") if "budget_s" in block)
    for source in (readme, (ROOT / "perf" / "gates.yaml").read_text(encoding="utf-8")):
        assert Gates.model_validate(yaml.safe_load(source)).speed


def test_the_systemd_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    unit = (ROOT / "docs" / "serving" / "flabc.service").read_text(encoding="utf-8")
    known = tmp_path / "flabc.service"
    known.write_text(unit.replace("/opt/flabc/bin/flabc", sys.executable))  # it has to exist
    done = subprocess.run(["systemd-analyze", "verify", known], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def _hold_the_demo_to_its_gates(folder: Path, environment: dict[str, str]) -> None:
    """flabc's own gate on what the README's commands left: nothing surely over its limit, size and proof within."""
    gates = ROOT / "perf" / "gates.yaml"
    command = ["flabc", "gate", "run", "--candidate", "engine", "--against", "dense-engine", "--gates", str(gates)]
    done = subprocess.run([*command, "-o", "verdict"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 3), done.stdout + done.stderr
    checks = json.loads((folder / "verdict" / "gate.json").read_text(encoding="utf-8"))["checks"]
    assert {check["kind"] for check in checks} == {"speed", "size", "quality", "parity"}
    assert all(check["outcome"] == "pass" for check in checks if check["kind"] in ("size", "parity")), done.stdout


def _hold_the_engine_to_its_baseline(folder: Path, environment: Mapping[str, str]) -> None:
    """The dense demo engine beside what it was on this class of machine, if it was ever measured on one."""
    perf = ROOT / "perf"
    command = ["flabc", "gate", "run", "--candidate", "dense-engine", "--gates", str(perf / "baseline.yaml"), "--json"]
    command += ["--against", str(perf / "baseline")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if "no baseline of this class of machine" in done.stderr:
        assert done.returncode == 3
        print(done.stderr)  # which classes there are
        return
    assert done.returncode in (0, 3), done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert all(check["outcome"] == "pass" for check in checks if check["kind"] != "speed"), done.stdout


def _check_the_promise(folder: Path) -> None:
    """What the README's commands left: a checkpoint that plain transformers loads and that answers as the engine."""
    code = (
        "import sys, warnings; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('pruned'); tokenizer = AutoTokenizer.from_pretrained('pruned')\n"
        "ids = tokenizer('def fibonacci(n):', return_tensors='pt')\n"
        "out = model.generate(**ids, max_new_tokens=48, do_sample=False)[0, ids['input_ids'].shape[1]:]\n"
        "assert 'flabc' not in sys.modules; print(out.tolist())"
    )
    fresh = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    from flabc import Session
    from flabc.runtime.sampling import SamplingParams

    answer = Session.open(folder / "engine").generate("def fibonacci(n):", SamplingParams(max_tokens=48))
    assert list(answer.token_ids) == eval(fresh.stdout)
