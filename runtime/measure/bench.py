"""Two engines side by side: each in its own process, runs interleaved so that the machine's drift cancels.

Both are opened several times: two processes of one engine need not be equally fast for as long as they live.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, count, cycle, islice
from pathlib import Path
from statistics import median

from flabc.artifact import folder_bytes
from flabc.console import Advance, progress
from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.spec import ModelSpec

from .energy import find_counter, measure_energy
from .environment import environment
from .load import measure_load
from .pairs import Pair, interleaved
from .process import Process, opened, warm_up
from .result import BenchResult, Cell, Energy, LoadPlan, Sample, Side, Workload
from .roofline import bytes_per_token, measure_roofline


def bench(
    candidate: Path,
    baseline: Path,
    workload: Workload,
    prompts: Sequence[str],
    heldout: Sequence[str],
    sweep: Sequence[Workload] = (),
    load: LoadPlan | None = None,
    *,
    openings: int | None = 1,
    budget_s: float | None = None,
) -> BenchResult:
    """Measure two engines.

    Args:
        candidate: the engine in question.
        baseline: what it is compared with.
        workload: what each run does.
        prompts: texts long enough for a prompt each; run i of both sides takes the same one, in every opening.
        heldout: texts for perplexity; may be empty.
        sweep: other lengths of prompts and batches, measured behind the first in each opening.
        load: requests that come at their own times, measured first, so that it is known what time is left.
        openings: how often both are opened, at least once; the workload's rounds are those of each. None for as often
            as the budget allows, which has to be given then.
        budget_s: engines are not opened once more if that would end later than so many seconds from now, going by the
            longest opening so far. The first one is measured to its end.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    assert openings is not None or budget_s is not None, "nothing says when to stop"
    began, longest = time.monotonic(), 0.0
    machine, works = environment(), (workload, *sweep)
    loaded = measure_load(candidate, baseline, workload, load, prompts) if load else None
    pairs: list[list[Pair]] = [[] for _ in works]
    found = _Found(), _Found()
    total = None if openings is None or budget_s is not None else openings * sum(work.rounds for work in works)
    with progress("measuring", total) as advance:
        for number in count() if openings is None else range(openings):
            opened_at = time.monotonic()
            if number and budget_s is not None and opened_at + longest > began + budget_s:
                break
            with _both(baseline, candidate, works, number) as sides:
                for work, measured in zip(works, pairs, strict=True):
                    warmups = [warm_up(side, prompts[0], work) for side in sides]
                    measured += _rounds(*sides, work, prompts, number, advance)
                    if work is workload:  # before what needs more memory than this
                        for each, side, warm in zip(found, sides, warmups, strict=True):
                            each.opened(side, warm)
                longest = max(longest, time.monotonic() - opened_at)
                if number == 0:
                    roofline = None if any(side.on_gpu for side in sides) else measure_roofline()
                    energies = [_energy(side, prompts[0], workload) for side in sides]
                    scored = [_scored(side, heldout) for side in sides]
    cells = [_cell(work, measured) for work, measured in zip(works, pairs, strict=True)]
    runs = cells[0].baseline, cells[0].candidate
    folders = baseline, candidate
    a, b = (_side(*each) for each in zip(folders, found, runs, energies, scored, strict=True))
    return BenchResult(
        created=datetime.now(UTC).replace(microsecond=0),
        environment=machine,
        workload=workload,
        baseline=a,
        candidate=b,
        roofline=roofline,
        foreign_cores=tuple(round(pair.foreign_cores, 3) for pair in pairs[0]),
        sweep=tuple(cells[1:]),
        load=loaded,
    )


@dataclass
class _Found:
    """What the openings of one engine say of it, beside its runs."""

    load_ms: list[float] = field(default_factory=list)
    peak_rss_mib: list[float] = field(default_factory=list)
    warmup_runs: int = 0
    on_gpu: bool = False
    spec: ModelSpec | None = None

    def opened(self, process: Process, warmup_runs: int) -> None:
        """Note one."""
        self.load_ms.append(process.description["load_ms"])
        self.peak_rss_mib.append(process.call("memory")["peak_rss_mib"])
        self.warmup_runs += warmup_runs
        self.on_gpu, self.spec = process.on_gpu, ModelSpec.model_validate(process.description["spec"])


@contextmanager
def _both(baseline: Path, candidate: Path, works: Sequence[Workload], number: int) -> Iterator[tuple[Process, Process]]:
    """Both opened one after the other, so that each has the machine to itself; who is first changes every time."""
    with ExitStack() as stack:
        if number % 2:
            b = stack.enter_context(opened(candidate, *works))
            yield stack.enter_context(opened(baseline, *works)), b
        else:
            a = stack.enter_context(opened(baseline, *works))
            yield a, stack.enter_context(opened(candidate, *works))


def _rounds(
    a: Process, b: Process, workload: Workload, prompts: Sequence[str], number: int, advance: Advance
) -> Iterator[Pair]:
    """As many pairs as the workload has rounds."""
    for pair in islice(interleaved(a, b, workload, cycle(prompts)), workload.rounds):
        advance(1)
        yield pair.model_copy(
            update={side: _of_opening(getattr(pair, side), number) for side in ("baseline", "candidate")}
        )


def _of_opening(runs: Iterable[Sample], number: int) -> tuple[Sample, ...]:
    return tuple(run.model_copy(update={"opening": number}) for run in runs)


def _cell(workload: Workload, pairs: Sequence[Pair]) -> Cell:
    shape = workload.model_dump(include={"prompt_tokens", "batch"})
    baseline = tuple(chain.from_iterable(pair.baseline for pair in pairs))
    return Cell(**shape, baseline=baseline, candidate=tuple(chain.from_iterable(pair.candidate for pair in pairs)))


def _energy(process: Process, prompt: str, workload: Workload) -> Energy:
    counter = find_counter(on_gpu=process.on_gpu)
    if isinstance(counter, str):
        return Energy(missing=counter)

    def work() -> int:
        process.run(prompt, workload)
        return workload.output_tokens * workload.batch

    return measure_energy(counter, work)


def _scored(process: Process, heldout: Sequence[str]) -> Perplexity | None:
    return Perplexity.model_validate(process.call("score", texts=list(heldout))) if heldout else None


def _side(
    folder: Path, found: _Found, samples: tuple[Sample, ...], energy: Energy, perplexity: Perplexity | None
) -> Side:
    assert found.spec is not None
    return Side(
        engine=str(folder),
        spec=found.spec,
        bytes_on_disk=folder_bytes(folder),
        load_ms=median(found.load_ms),
        peak_rss_mib=max(found.peak_rss_mib),
        on_gpu=found.on_gpu,
        warmup_runs=found.warmup_runs,
        samples=samples,
        perplexity=perplexity,
        bytes_per_token=bytes_per_token(folder, found.spec),
        energy=energy,
    )
