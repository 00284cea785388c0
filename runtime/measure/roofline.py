"""Roofline: how fast this machine reads memory and multiplies, which is the most that an engine can reach.

S. Williams, A. Waterman, D. Patterson, Roofline: an insightful visual performance model (2009). Decoding one sequence
reads every weight once a token, so memory bounds it; a long prompt multiplies, so arithmetic does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flabc.artifact import GRAPH
from flabc.spec import ModelSpec

from .result import Roofline

#: Bytes that are read at once: far more than caches hold.
READ = 256 * 2**20

#: Rows and columns of the matrices that are multiplied, as large as a model's.
SIDE = 2048

#: Measurements, of which the best counts: it is a limit that is looked for.
REPEATS = 5


def measure_roofline() -> Roofline:
    """Measure it with all cores; takes some two seconds."""
    return Roofline(bandwidth_gib_s=_bandwidth(os.cpu_count() or 1), gflops=_throughput())


def bytes_per_token(folder: Path, spec: ModelSpec) -> int:
    """Bytes of weights that one output token of one sequence reads: all but an input embedding of its own.

    Args:
        folder: the engine's.
        spec: its shapes.
    """
    stored = (folder / f"{GRAPH}.data").stat().st_size
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return round(stored * (1 - looked_up / spec.num_parameters))


def _bandwidth(threads: int) -> float:
    numbers = np.ones(READ // 4, np.float32)
    parts = np.array_split(numbers, threads)
    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter while it sums

        def read() -> None:
            list(pool.map(lambda part: part.max(), parts))

        return READ / 2**30 / _best_s(read)


def _throughput() -> float:
    a, b = (np.random.default_rng(seed).standard_normal((SIDE, SIDE), np.float32) for seed in (0, 1))
    return 2 * SIDE**3 / 1e9 / _best_s(lambda: a @ b)


def _best_s(work: Callable[[], object]) -> float:
    work()

    def once() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return min(once() for _ in range(REPEATS))
