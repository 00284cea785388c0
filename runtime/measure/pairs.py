"""Pairs: two engines measured again and again, so close together that whatever the machine does hits both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from flabc.frozen import Frozen

from .foreign import ForeignLoad
from .process import Process, opened, warm_up
from .result import Sample, Workload


class Pair(Frozen):
    """One block of baseline, candidate, candidate, baseline on the same prompt.

    Args:
        baseline: its two runs.
        candidate: its two runs.
        foreign_cores: cores that others kept busy meanwhile, on average.
    """

    baseline: tuple[Sample, Sample]
    candidate: tuple[Sample, Sample]
    foreign_cores: float


@contextmanager
def measured_pairs(
    candidate: Path, baseline: Path, workload: Workload, prompts: Sequence[str]
) -> Iterator[Iterator[Pair]]:
    """Open two engines, each in its own process, and yield pairs without end, one at a time as they are asked for.

    Args:
        candidate: the folder of the engine in question.
        baseline: that of the engine it is compared with.
        workload: what each run does.
        prompts: texts long enough for a prompt each; pair i takes one of them for all its runs.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    with opened(baseline, workload) as a, opened(candidate, workload) as b:
        for side in (a, b):
            warm_up(side, prompts[0], workload)
        yield interleaved(a, b, workload, prompts)


def interleaved(a: Process, b: Process, workload: Workload, prompts: Sequence[str]) -> Iterator[Pair]:
    """Pairs without end of two engines that are open, each measured when it is asked for; ``a`` is the baseline."""
    for text in cycle(prompts):
        # ABBA: whatever drifts steadily hits both sides alike.
        with ForeignLoad([a.pid, b.pid]) as foreign:
            first = a.run(text, workload)
            tried = b.run(text, workload), b.run(text, workload)
            last = a.run(text, workload)
        yield Pair(baseline=(first, last), candidate=tried, foreign_cores=foreign.cores)
