"""Huge pages for weights: at every token a processor reads all of them, and looks up the address of every page.

With 4 KiB a page that costs a tenth to a quarter of the time (``perf/huge_pages.py``). Linux gathers what is in memory
already into pages of 2 MiB where it is asked to: madvise(2), MADV_COLLAPSE, since Linux 6.1. Elsewhere nothing happens,
and ``flabc doctor`` says so.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

MAPS = Path("/proc/self/maps")

#: What the system allows: ``always``, ``madvise`` or ``never``, the one in force in brackets.
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Bytes of a huge page, on x86-64 and on arm64 with pages of 4 KiB.
HUGE = 2**21

#: Below so many bytes of weights the caches of a processor hold the addresses, or the weights themselves.
LEAST = 64 * 2**20

#: Linux' numbers of what madvise(2) is to do.
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25


def allowed() -> bool:
    """Whether the system gives huge pages to whoever asks for them."""
    return sys.platform == "linux" and SETTING.is_file() and "[never]" not in SETTING.read_text(encoding="utf-8")


def gather(weights: int) -> int:
    """Gather what this process has in memory into huge pages, if so many bytes of weights make it worth while.

    Takes about two seconds a gigabyte the first time. Memory that nobody has written to stays unused.

    Returns:
        the bytes of the mappings that are in huge pages now; 0 where the system cannot gather.
    """
    if weights < LEAST or not allowed():
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    done = 0
    for begin, end in _anonymous():
        low = -(-begin // HUGE) * HUGE
        size = end // HUGE * HUGE - low
        if size > 0:
            libc.madvise(low, size, MADV_HUGEPAGE)
            done += size if libc.madvise(low, size, MADV_COLLAPSE) == 0 else 0
    return done


def _anonymous() -> Iterator[tuple[int, int]]:
    """Begin and end of each mapping of this process that can be written to and that no file backs."""
    for line in MAPS.read_text(encoding="utf-8").splitlines():
        place, rights, _, _, inode = line.split(maxsplit=5)[:5]
        if rights.startswith("rw") and inode == "0" and "[stack" not in line:
            begin, end = (int(at, 16) for at in place.split("-"))
            yield begin, end
