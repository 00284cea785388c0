"""The machine and the software that figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from flabc.artifact import library_versions

#: What Linux says of the processor.
CPU_INFO = Path("/proc/cpuinfo")

#: How Linux chooses the processor's clock, where it lets itself be asked.
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

#: Processor features that decide how fast matrices are multiplied, as Linux names them: of x86, then of Arm.
CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "i8mm", "bf16", "sve", "sve2"),
)

#: What a command may take that only tells something: a driver that hangs must not hang a measurement.
TELL_S = 10.0

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
        **_processor(),
        "physical_cores": psutil.cpu_count(logical=False),
        "cpu_mhz": _cpu_mhz(),
        "governor": _read(GOVERNOR).strip() or None,
        "cpu_temperature_c": _cpu_temperature(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "nvidia_smi": nvidia_smi(),
        "system": platform.platform(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": library_versions(),
        "revision": revision(),
    }


def machine_class(of: Mapping[str, Any] | None = None) -> str:
    """What has to be alike for times to be comparable as shares of what a machine can do at best.

    Args:
        of: an ``environment``; by default this machine's.
    """
    of = _processor() if of is None else of
    return f"{of['cpu']}, {of['logical_cores']} cores, {', '.join(of['cpu_features']) or 'no known features'}"


def cpu_name() -> str:
    """The processor's name as the system tells it; of Arm under Linux the numbers of who made it and what it is."""
    told = dict(_fields(line) for line in _read(CPU_INFO).splitlines() if ":" in line)
    if "model name" in told:
        return told["model name"]
    numbers = [told[name] for name in ("CPU implementer", "CPU part") if name in told]
    on_mac = _told(["sysctl", "-n", "machdep.cpu.brand_string"]) if platform.system() == "Darwin" else None
    return on_mac or " ".join([platform.processor() or platform.machine(), *numbers])


def cpu_features() -> list[str]:
    """Those of ``CPU_FEATURES`` that it has; a name alone can stand for several generations of a processor."""
    flags = set(_read(CPU_INFO).split())
    return [feature for feature in CPU_FEATURES if feature in flags]


def nvidia_smi() -> dict[str, str] | None:
    """What the driver's own tool says of the first GPU; None where there is no such tool, or no GPU that it sees."""
    said = _told(["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader", "--id=0"])
    return dict(zip(ASKED, (part.strip() for part in said.split(",")), strict=False)) if said else None


def revision() -> str | None:
    """The commit of the folder where this runs, with "-dirty" if files differ from it; None outside of git."""
    return _told(["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"])


def _processor() -> dict[str, Any]:
    return {"cpu": cpu_name(), "cpu_features": cpu_features(), "logical_cores": os.cpu_count()}


def _fields(line: str) -> tuple[str, str]:
    name, value = line.split(":", 1)
    return name.strip(), value.strip()


def _read(file: Path) -> str:
    """A file of the system's, empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _told(command: Sequence[str]) -> str | None:
    """What a command says; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TELL_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_mhz() -> float | None:
    try:
        found = psutil.cpu_freq()
    except (OSError, RuntimeError, ValueError):  # psutil, of systems that do not tell
        return None
    return None if found is None else round(found.current)


def _cpu_temperature() -> float | None:
    """The hottest sensor of the processor."""
    read = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    sensors = read() if read else {}
    found = [each.current for name in ("coretemp", "k10temp", "zenpower") for each in sensors.get(name, ())]
    return max(found, default=None)
