from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tomllib
from pathlib import Path

import onnxruntime
import pytest
import torch

from flabc.runtime import doctor


def test_versions_are_those_of_the_installed_packages() -> None:
    assert doctor.version_of("numpy") == importlib.metadata.version("numpy")
    assert doctor.version_of("no-such-package-anywhere") is None


def test_the_providers_are_those_of_onnxruntime() -> None:
    (providers,) = [finding for finding in doctor.examine() if finding.name == "execution providers"]
    assert providers.detail == ", ".join(onnxruntime.get_available_providers())


def test_every_extra_it_looks_at_is_one_of_the_project() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, packages in doctor.EXTRAS.items():
        brought = {requirement.split(">")[0] for requirement in project["optional-dependencies"][extra]}
        assert set(packages) <= brought, extra


def test_one_onnxruntime_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda package: None if package == "onnxruntime-gpu" else "1.0")
    (clash,) = [finding for finding in doctor.examine() if finding.name == "clashing packages"]
    assert clash.status == "ok"


def test_two_onnxruntimes_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda _: "1.0")
    (clash,) = [finding for finding in doctor.examine() if finding.name == "clashing packages"]
    assert clash.status == "problem"
    assert "pip uninstall" in clash.fix


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version_of", lambda _: None)
    findings = {finding.name: finding for finding in doctor.examine()}
    for extra in doctor.EXTRAS:
        assert findings[f"extra {extra}"].fix == f"pip install 'flabc[{extra}]'"
    assert findings["clashing packages"].status == "ok"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with NVIDIA's driver."""
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.1\nGCC version\n")
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")


def found(name: str) -> doctor.Finding:
    (finding,) = [finding for finding in doctor.examine() if finding.name == name]
    return finding


def test_without_a_driver_nothing_is_said_of_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    names = {finding.name for finding in doctor.examine()}
    assert "cuda" in names
    assert not names & {"torch on the GPU", "small kernels fused", "onnxruntime on the GPU"}


@pytest.mark.usefixtures("driver")
def test_a_torch_without_cuda_is_told_on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "580.1" in found("cuda").detail
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = found("torch on the GPU")
    assert (finding.status, finding.detail) == ("problem", f"torch {torch.__version__} is built without CUDA")
    assert "torch" in finding.fix


@pytest.mark.usefixtures("driver")
def test_a_torch_that_sees_the_device_is_told_with_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "sees no device" in found("torch on the GPU").detail
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    finding = found("torch on the GPU")
    assert finding.status == "ok"
    assert "H100" in finding.detail


@pytest.mark.usefixtures("driver")
def test_what_compiles_and_what_runs_engines_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert found("onnxruntime on the GPU").fix == "pip uninstall -y onnxruntime && pip install 'flabc[gpu]'"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert found("onnxruntime on the GPU").status == "ok"
    there = {"triton": None, "pynvml": None}
    true = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there[name] if name in there else true(name))
    assert found("small kernels fused").fix == "pip install triton"
    there["triton"] = true("json")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert found("small kernels fused").detail == "no C compiler, which Triton needs"


def test_a_broken_package_is_a_finding_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(onnxruntime, "get_available_providers")  # as a half removed package is
    finding = found("execution providers")
    assert (finding.status, finding.fix) == ("problem", "pip install --force-reinstall onnxruntime")
    assert "AttributeError" in finding.detail
