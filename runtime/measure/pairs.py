"""Pairs: two engines measured again and again, so close together that whatever the machine does hits both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TypeVar

from flabc.frozen import Frozen

from .foreign import ForeignLoad
from .process import Process, both_opened, warm_up
from .result import Sample, Workload

T = TypeVar("T")


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


#: The pairs of two processes, from when they were opened until they were closed.
Opening = tuple[Pair, ...]


def measured_openings(candidate: Path, baseline: Path, workload: Workload, prompts: Sequence[str]) -> Iterator[Opening]:
    """Open two engines, measure pairs for as long as that took, and close them; without end, one opening when asked.

    Two processes of one engine need not be equally fast for as long as they live. That looks like a difference between
    engines, however many pairs are measured: so an opening is one observation, and there have to be several
    (T. Kalibera and R. Jones, Rigorous Benchmarking in Reasonable Time, 2013).

    Args:
        candidate: the folder of the engine in question.
        baseline: that of the engine it is compared with.
        workload: what each run does.
        prompts: texts long enough for a prompt each; pairs take them in turns.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    texts = cycle(prompts)
    while True:
        began = time.monotonic()
        with both_opened(baseline, candidate, workload) as (a, b):
            for side in (a, b):
                warm_up(side, prompts[0], workload)
            pairs = for_as_long(time.monotonic() - began, interleaved(a, b, workload, texts))
        yield tuple(pairs)


def for_as_long(seconds: float, measured: Iterator[T]) -> list[T]:
    """What is measured until so many seconds are over, and one at least."""
    began, found = time.monotonic(), list[T]()
    for each in measured:
        found.append(each)
        if time.monotonic() - began >= seconds:
            break
    return found


def interleaved(a: Process, b: Process, workload: Workload, texts: Iterable[str]) -> Iterator[Pair]:
    """A pair for each text of two engines that are open, each measured when it is asked for; ``a`` is the baseline."""
    for text in texts:
        # ABBA: whatever drifts steadily hits both sides alike.
        with ForeignLoad([a.pid, b.pid]) as foreign:
            first = a.run(text, workload)
            tried = b.run(text, workload), b.run(text, workload)
            last = a.run(text, workload)
        yield Pair(baseline=(first, last), candidate=tried, foreign_cores=foreign.cores)
