"""Energy: read from the machine's own counters over windows of seconds, idle power told apart; never estimated.

NVIDIA: ``nvmlDeviceGetTotalEnergyConsumption`` (NVML API reference), millijoules since the driver was loaded. Intel and
AMD: Running Average Power Limit, microjoules under ``/sys/class/powercap`` (Linux, Documentation/power/powercap).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from .result import Energy

#: Where Linux shows RAPL's counters.
POWERCAP = Path("/sys/class/powercap")

#: Seconds that a window lasts at least: counters move in steps of tens of milliseconds.
WINDOW_S = 2.0


class Counter(Protocol):
    """Something that counts joules."""

    name: str

    def joules(self) -> float:
        """What was used since some moment in the past."""
        ...


class Rapl:
    """The packages of the processor."""

    name = "RAPL"

    def __init__(self, zones: Sequence[Path]) -> None:
        self._zones = zones
        self._ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        self._before = self._read()
        self._turns = [0] * len(zones)

    def joules(self) -> float:
        """Of all packages; a counter that has begun anew since the last reading is seen."""
        now = self._read()
        for at, (before, value) in enumerate(zip(self._before, now, strict=True)):
            self._turns[at] += value < before
        self._before = now
        return (
            sum(value + turns * most for value, turns, most in zip(now, self._turns, self._ranges, strict=True)) / 1e6
        )

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


class Nvml:
    """The first GPU, whole."""

    name = "NVML"

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._device = nvml.nvmlDeviceGetHandleByIndex(0)

    def joules(self) -> float:
        """Of the device since its driver was loaded."""
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000


def find_counter(*, on_gpu: bool = False, powercap: Path = POWERCAP) -> Counter | str:
    """The counter of what computes, or why there is none.

    Args:
        on_gpu: whether that is a GPU.
        powercap: where Linux shows the processor's counters.
    """
    if on_gpu:
        return _nvml()
    zones = sorted(zone for zone in powercap.glob("*-rapl:*") if zone.name.count(":") == 1)
    try:
        # "psys", where there is one, is the whole machine, the packages among it.
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        return Rapl(packages) if packages else "the system shows no energy counter (RAPL)"
    except (OSError, ValueError) as error:
        return f"RAPL cannot be read: {error}"


def _nvml() -> Nvml | str:
    try:
        import pynvml
    except ImportError as error:
        return f"NVML cannot be read: {error}; pip install nvidia-ml-py"
    try:
        return Nvml(pynvml)
    except pynvml.NVMLError as error:
        return f"NVML cannot be read: {error}"


def measure_energy(
    counter: Counter,
    work: Callable[[], int],
    *,
    clock: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> Energy:
    """Joules per token of some work, with what the machine uses when idle taken off.

    Args:
        counter: where it is read.
        work: does it once and says how many tokens it made; it is repeated until the window is full.
        clock: seconds.
        rest: waits so many seconds.
    """
    began, before = clock(), counter.joules()
    rest(WINDOW_S)
    idle_w = (counter.joules() - before) / (clock() - began)
    tokens, began, before = 0, clock(), counter.joules()
    while clock() - began < WINDOW_S:
        tokens += work()
    used, taken = counter.joules() - before, clock() - began
    return Energy(
        counter=counter.name,
        joules_per_token=(used - idle_w * taken) / tokens,
        idle_w=idle_w,
        window_s=taken,
        tokens=tokens,
    )
