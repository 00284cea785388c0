from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import onnxruntime
import pytest

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
