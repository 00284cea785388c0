"""Foreign load: how busy others keep the machine while something is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

import psutil

#: Times in which a core does nothing for anyone.
_IDLE = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user's already


@dataclass
class ForeignLoad:
    """Watches the cores between two readings.

    Args:
        pids: the processes that are measured; their time is not foreign, nor is this process's own.
    """

    pids: Sequence[int]

    def __enter__(self) -> Self:
        self._began, self._busy, self._own = time.monotonic(), _busy_s(), self._own_s()
        return self

    def __exit__(self, *_: object) -> None:
        taken = max(time.monotonic() - self._began, 1e-9)
        own = sum(used - self._own[pid] for pid, used in self._own_s().items())
        #: Cores that others kept busy on average, time that a hypervisor took away included.
        self.cores = max(0.0, (_busy_s() - self._busy - own) / taken)

    def _own_s(self) -> dict[int, float]:
        """Seconds that each process has used. One that is gone is left out: what it used counts as foreign."""
        used = dict[int, float]()
        for pid in (os.getpid(), *self.pids):
            with suppress(psutil.NoSuchProcess):
                used[pid] = sum(psutil.Process(pid).cpu_times()[:2])
        return used


def _busy_s() -> float:
    """Seconds that the cores have been busy since the machine started, all together."""
    times = psutil.cpu_times()._asdict()
    return float(sum(value for name, value in times.items() if name not in _IDLE))
