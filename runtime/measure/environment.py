"""The machine and the software that figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from flabc.artifact import library_versions


def environment() -> dict[str, Any]:
    """Processor, memory, system, versions and the load at this moment."""
    return {
        "cpu": cpu_name(),
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "load_average_1m": round(os.getloadavg()[0], 2),
        "versions": library_versions(),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
