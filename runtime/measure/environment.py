"""The machine and the software that figures were measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from flabc.artifact import library_versions

#: What Linux says of the processor.
CPU_INFO = Path("/proc/cpuinfo")

#: How Linux chooses the processor's clock, where it lets itself be asked.
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

#: Processor features that decide how fast matrices are multiplied, as Linux names them.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")

#: What ``nvidia-smi --query-gpu`` is asked.
ASKED = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "mig.mode.current",
)


def environment() -> dict[str, Any]:
    """Processor, memory, GPU, system, versions, and clocks, temperatures and load at this moment.

    ``revision`` is that of the folder where the command runs; what the system does not tell is None.
    """
    return {
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "cpu_mhz": _cpu_mhz(),
        "governor": GOVERNOR.read_text(encoding="utf-8").strip() if GOVERNOR.is_file() else None,
        "cpu_temperature_c": _cpu_temperature(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "nvidia_smi": nvidia_smi(),
        "system": platform.platform(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": library_versions(),
        "revision": revision(),
    }


def machine_class(of: dict[str, Any]) -> str:
    """What has to be alike for times to be comparable as shares of what a machine can do at best.

    Args:
        of: an ``environment``.
    """
    return f"{of['cpu']}, {of['logical_cores']} cores, {', '.join(of['cpu_features']) or 'no known features'}"


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    if CPU_INFO.is_file():
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of ``CPU_FEATURES`` that it has; a name alone can stand for several generations of a processor."""
    flags = set(CPU_INFO.read_text(encoding="utf-8").split()) if CPU_INFO.is_file() else set[str]()
    return [feature for feature in CPU_FEATURES if feature in flags]


def nvidia_smi() -> dict[str, str] | str | None:
    """What the driver's own tool says of the first GPU, or why it says nothing; None where there is no such tool."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stdout + done.stderr).strip()
    return dict(zip(ASKED, (part.strip() for part in done.stdout.split(",")), strict=False))


def revision() -> str | None:
    """The commit of the folder where this runs, with "-dirty" if files differ from it; None outside of git."""
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def _cpu_mhz() -> float | None:
    found = psutil.cpu_freq()
    return None if found is None else round(found.current)


def _cpu_temperature() -> float | None:
    """The hottest sensor of the processor."""
    read = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    sensors = read() if read else {}
    found = [each.current for name in ("coretemp", "k10temp", "zenpower") for each in sensors.get(name, ())]
    return max(found, default=None)
