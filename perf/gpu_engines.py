"""Two engine folders in turns, in the library that each is made for. Needs what runs them, not torch.

Between steps the logits of all rows come to the processor, as ``Backend`` has it: this is what a server of flabc pays,
and more than the device alone takes. So it is no peer of the cells of the suite, whose tokens stay on the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from flabc.errors import EngineError
from flabc.frozen import Frozen
from flabc.runtime.backend import Backend, Limits
from flabc.runtime.measure.result import Cell, Sample, Workload
from flabc.runtime.session import Session


class EngineResult(Frozen):
    """Two engines; each cell has the runs of both."""

    schema_version: int = 1
    dense: str
    pruned: str
    backends: tuple[str, str]
    provider: str
    cells: tuple[Cell, ...]


def measure_engines(dense: Path, pruned: Path, workloads: Sequence[Workload], provider: str) -> EngineResult:
    """Measure both in rounds of dense, pruned, pruned, dense, after a run of each to warm up.

    Args:
        dense: an engine folder.
        pruned: another.
        workloads: what is measured, one after another.
        provider: ``cuda`` or ``cpu``; an engine for TensorRT runs on a GPU whatever is said.

    Raises:
        FlabcError: if a folder is damaged, or its library is missing or lacks the provider.
    """
    limits = Limits(
        max_batch=max(each.batch for each in workloads),
        max_length=max(each.prompt_tokens + each.output_tokens for each in workloads),
        provider=provider,
    )
    sides = [Session.open(folder, limits=limits).backend for folder in (dense, pruned)]
    return EngineResult(
        dense=dense.name,
        pruned=pruned.name,
        backends=(sides[0].name, sides[1].name),
        provider=provider,
        cells=tuple(_cell(sides, workload) for workload in workloads),
    )


def _cell(sides: Sequence[Backend], workload: Workload) -> Cell:
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for side in sides:
        _sample(side, workload)
    for _ in range(workload.rounds):
        for at in (0, 1, 1, 0):
            samples[at].append(_sample(sides[at], workload))
    shape = workload.model_dump(include={"prompt_tokens", "batch"})
    return Cell(**shape, baseline=tuple(samples[0]), candidate=tuple(samples[1]))


def _sample(backend: Backend, workload: Workload) -> Sample:
    """One run: random prompts, then the likeliest token after another for all rows at once."""
    room = backend.limits.max_length
    if workload.prompt_tokens + workload.output_tokens > room:
        raise EngineError("The model has too few positions.", expected=f"at most {room} tokens in all")
    draw = np.random.default_rng(0)
    new = draw.integers(0, backend.spec.vocab_size, (workload.batch, workload.prompt_tokens))
    backend.start(workload.batch)
    marks = [time.perf_counter()]
    for _ in range(workload.output_tokens):
        counts = np.full(workload.batch, new.shape[1])
        new = backend.extend(new, counts).argmax(-1)[:, None]
        marks.append(time.perf_counter())
    first, *rest = (1000 * (after - before) for before, after in pairwise(marks))
    return Sample(ttft_ms=first, token_ms=tuple(rest))
