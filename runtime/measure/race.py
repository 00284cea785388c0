"""Several engines against each other: each in its own process, taking turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from flabc.console import progress

from .process import opened, warm_up
from .result import Sample, Workload


def race(engines: Sequence[Path], workload: Workload, texts: Sequence[str]) -> list[list[Sample]]:
    """Time engines on the same prompts.

    Args:
        engines: their folders.
        workload: what each run does; every engine runs once a round, the order turning round with every round.
        texts: where prompts are cut from; one that is long enough is taken.

    Returns:
        the samples of each engine.

    Raises:
        EngineError: if an engine cannot be opened or does not produce the tokens it should.
    """
    prompt = max(texts, key=len)
    with ExitStack() as stack:
        processes = [stack.enter_context(opened(folder, workload)) for folder in engines]
        for process in processes:
            warm_up(process, prompt, workload)
        samples: list[list[Sample]] = [[] for _ in engines]
        with progress("measuring", workload.rounds * len(engines)) as advance:
            for turn in range(workload.rounds):
                order = range(len(engines)) if turn % 2 == 0 else reversed(range(len(engines)))
                for at in order:
                    samples[at].append(processes[at].run(prompt, workload))
                    advance(1)
    return samples
