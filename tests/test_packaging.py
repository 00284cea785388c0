"""What is installed, and what importing it pulls in."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("compress", "export", "runtime", "recipes", "perf")


def expected_files() -> set[str]:
    """Every tracked file of the package, as it should lie in site-packages."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    inside = {name.removeprefix("src/") for name in tracked if name.startswith("src/flabc/")}
    links = {f"flabc/{part}" for part in PARTS}
    return (inside - links) | {f"flabc/{name}" for name in tracked if name.split("/")[0] in PARTS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from it, as pip does."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run([*command, "-t", "sdist"], cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out / "unpacked", filter="data")
    unpacked = next((out / "unpacked").iterdir())
    subprocess.run([*command, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    return out


def test_the_wheel_holds_exactly_the_tree(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == expected_files()


def test_no_script_hides_a_module_of_python() -> None:
    """Python looks for what a script imports beside the script first."""
    assert not {file.stem for file in (ROOT / "perf").glob("*.py")} & sys.stdlib_module_names


def test_only_flabc_lands_in_site_packages(built: Path) -> None:
    names = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"flabc"}


def test_the_wheel_imports_without_the_tree(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path)
    code = (
        "import flabc, flabc.api, flabc.cli, flabc.recipe; print(flabc.__file__); print(list(flabc.recipe.shipped()))"
    )
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout
    assert "flab-22" in done.stdout


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("flabc", {"pydantic", "numpy", "torch", "onnxruntime"}),
        ("flabc.cli", {"pydantic", "numpy", "torch", "transformers", "onnxruntime"}),
        ("flabc.recipe", {"torch", "transformers", "onnxruntime"}),
        ("flabc.api", {"torch", "transformers", "onnxruntime", "onnx_ir", "matplotlib"}),
        ("flabc.runtime.session", {"torch", "transformers"}),
        ("flabc.runtime.measure.worker", {"torch", "transformers"}),
        ("flabc.runtime.server.process", {"torch", "transformers", "onnx_ir"}),
        ("flabc.runtime.server.app", {"torch", "transformers", "onnx_ir"}),
        ("flabc.perf.report", {"torch", "matplotlib"}),
    ],
)
def test_importing_pulls_in_nothing_heavy(module: str, forbidden: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not forbidden & set(done.stdout.split())


def test_the_extras_of_a_serving_host_do_not_ask_for_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cpu"], *extras["serve"]]
    assert not any(line.startswith(("torch", "transformers", "flabc")) for line in wanted)
    assert any(line.startswith("onnxruntime") for line in wanted)
    assert any(line.startswith("uvicorn") for line in wanted)
