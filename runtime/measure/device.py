"""A device as torch sees it: its roofline, its memory, its clock, and what it is. Imports torch.

Roofline: Williams, Waterman, Patterson (2009), as in ``roofline.py``, which measures the processor by numpy.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import psutil
import torch

from .environment import environment
from .shape_result import DeviceRoofline

#: Bytes of the copy, and rows and columns of the products, on a GPU and on a processor.
COPIED = {"cuda": 2**30, "cpu": 2**27}
SIDE = {"cuda": 8192, "cpu": 1024}

#: Measurements, of which the best counts: it is a limit that is looked for.
REPEATS = 5


class Clock(Protocol):
    """Remembers moments of a device."""

    def mark(self) -> None:
        """When all that was asked of the device so far is done."""
        ...

    def gaps_ms(self) -> tuple[float, ...]:
        """Between each moment and the next; waits for the last."""
        ...


class HostClock:
    """The processor's own work is done when it is asked for."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Remember now."""
        self._marks.append(time.perf_counter())

    def gaps_ms(self) -> tuple[float, ...]:
        """Between each moment and the next."""
        return tuple(1000 * (after - before) for before, after in pairwise(self._marks))


class DeviceClock:
    """CUDA events: the device notes the time itself, and nobody waits for it between steps."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Let the device note when it comes here."""
        make: Any = torch.cuda.Event
        event = make(enable_timing=True)
        event.record()
        self._marks.append(event)

    def gaps_ms(self) -> tuple[float, ...]:
        """Between each moment and the next; waits for the last."""
        self._marks[-1].synchronize()
        return tuple(before.elapsed_time(after) for before, after in pairwise(self._marks))


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return DeviceClock() if device.type == "cuda" else HostClock()


def wait_for(device: torch.device) -> None:
    """Wait until all that was asked of a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device; on a processor, that of the machine."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    gc.collect()  # graphs and caches of what was measured before
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def measure_device(device: torch.device, dtype: torch.dtype) -> DeviceRoofline:
    """Measure what it can do at best; takes a second or two."""
    return DeviceRoofline(
        bandwidth_gib_s=_bandwidth(device), gflops=_throughput(device, dtype), dtype=str(dtype).removeprefix("torch.")
    )


def _bandwidth(device: torch.device) -> float:
    source = torch.ones(COPIED[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED[device.type] / 2**30 / _best_s(device, lambda: target.copy_(source))


def _throughput(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, dtype=torch.float32, device=device).to(dtype) for _ in range(2))
    return float(2 * side**3 / 1e9 / _best_s(device, lambda: a @ b))


def _best_s(device: torch.device, work: Callable[[], object]) -> float:
    work()  # libraries choose and load what they need
    wait_for(device)

    def once() -> float:
        clock = clock_of(device)
        clock.mark()
        work()
        clock.mark()
        return clock.gaps_ms()[0] / 1000

    return min(once() for _ in range(REPEATS))


def device_environment(device: torch.device) -> dict[str, Any]:
    """The machine, and what torch says of the device."""
    found: dict[str, Any] = environment()
    if device.type != "cuda":
        return found | {"threads": torch.get_num_threads()}
    about = torch.cuda.get_device_properties(device)
    version: Any = torch.version
    cudnn: Any = torch.backends.cudnn
    return found | {
        "gpu": about.name,
        "gpu_memory_gib": round(about.total_memory / 2**30, 1),
        "gpu_capability": f"{about.major}.{about.minor}",
        "gpu_multiprocessors": about.multi_processor_count,
        "cuda": version.cuda,
        "cudnn": cudnn.version(),
    }
