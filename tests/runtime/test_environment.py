from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from flabc.runtime.measure import environment


def test_it_can_be_written_down_and_names_the_processor() -> None:
    found = environment.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"] in environment.machine_class(found)
    assert f"{os.cpu_count()} cores" in environment.machine_class(found)


def test_the_revision_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.revision() is None
    (file := tmp_path / "a.txt").write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "a.txt"], [*who, "commit", "-qm", "1"], [*who, "tag", "-am", "x", "v1"]):
        subprocess.run(["git", *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    assert environment.revision() == head[:12]
    file.write_text("2")
    assert environment.revision() == f"{head[:12]}-dirty"


def test_a_gpu_is_asked_by_its_own_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    tool.write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "H100, 550.1, 1980 MHz"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    told = environment.nvidia_smi()
    assert told == {"name": "H100", "driver_version": "550.1", "clocks.sm": "1980 MHz"}
    assert asked.read_text().startswith("--query-gpu=name,driver_version,clocks.sm,")
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    assert environment.nvidia_smi() is None
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(environment, "TELL_S", 0.2)
    assert environment.nvidia_smi() is None  # a driver that hangs
    monkeypatch.setenv("PATH", "/nowhere")
    assert environment.nvidia_smi() is None


def test_what_the_system_does_not_tell_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent() -> None:
        raise NotImplementedError("can't find current frequency file")

    monkeypatch.setattr(psutil, "cpu_freq", silent)
    monkeypatch.setattr(psutil, "sensors_temperatures", dict, raising=False)
    monkeypatch.setattr(environment, "GOVERNOR", tmp_path)  # a folder: reading it fails
    found = environment.environment()
    assert (found["cpu_mhz"], found["governor"], found["cpu_temperature_c"]) == (None, None, None)


def test_arm_processors_are_told_apart_by_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (info := tmp_path / "cpuinfo").write_text(
        "Features\t: fp asimd asimddp i8mm bf16 sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    )
    monkeypatch.setattr(environment, "CPU_INFO", info)
    assert environment.cpu_name().endswith(" 0x41 0xd4f")
    assert environment.machine_class().endswith("asimddp, i8mm, bf16, sve")


def test_features_are_those_that_linux_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (info := tmp_path / "cpuinfo").write_text("model name\t: A B\nflags\t\t: fpu avx2 avx512_vnni\n")
    monkeypatch.setattr(environment, "CPU_INFO", info)
    assert environment.cpu_name() == "A B"
    assert environment.cpu_features() == ["avx2", "avx512_vnni"]
    monkeypatch.setattr(environment, "CPU_INFO", tmp_path / "none")
    assert environment.cpu_features() == []
    assert "no known features" in environment.machine_class(environment.environment())
