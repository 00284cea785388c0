"""Two engines side by side: each in its own process, runs interleaved so that the machine's drift cancels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import chain, cycle, islice
from pathlib import Path

from flabc.artifact import folder_bytes
from flabc.console import progress
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
) -> BenchResult:
    """Measure two engines.

    Args:
        candidate: the engine in question.
        baseline: what it is compared with.
        workload: what each run does.
        prompts: texts long enough for a prompt each; run i of both sides takes the same one.
        heldout: texts for perplexity; may be empty.
        sweep: other lengths of prompts and batches, measured after the first in the same way.
        load: requests that come at their own times, measured last.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    machine = environment()
    with opened(baseline, workload, *sweep) as a, opened(candidate, workload, *sweep) as b:
        roofline = None if a.on_gpu or b.on_gpu else measure_roofline()
        warmups = {side: warm_up(side, prompts[0], workload) for side in (a, b)}
        pairs = _rounds(a, b, workload, prompts, "measuring")
        memory = {side: side.call("memory")["peak_rss_mib"] for side in (a, b)}  # before what needs more than serving
        cells = [_cell(a, b, each, prompts) for each in sweep]
        energies = {side: _energy(side, prompts[0], workload) for side in (a, b)}
        samples = {a: _runs(pair.baseline for pair in pairs), b: _runs(pair.candidate for pair in pairs)}
        sides = [_side(side, samples[side], warmups[side], memory[side], energies[side], heldout) for side in (a, b)]
    return BenchResult(
        created=datetime.now(UTC).replace(microsecond=0),
        environment=machine,
        workload=workload,
        baseline=sides[0],
        candidate=sides[1],
        roofline=roofline,
        foreign_cores=tuple(round(pair.foreign_cores, 3) for pair in pairs),
        sweep=tuple(cells),
        load=measure_load(candidate, baseline, workload, load, prompts) if load else None,
    )


def _cell(a: Process, b: Process, workload: Workload, prompts: Sequence[str]) -> Cell:
    """Both sides at another length or batch, interleaved as ever."""
    for side in (a, b):
        warm_up(side, prompts[0], workload)
    name = f"measuring prompt {workload.prompt_tokens}, batch {workload.batch}"
    pairs = _rounds(a, b, workload, prompts, name)
    shape = workload.model_dump(include={"prompt_tokens", "batch"})
    baseline, candidate = _runs(pair.baseline for pair in pairs), _runs(pair.candidate for pair in pairs)
    return Cell(**shape, baseline=baseline, candidate=candidate)


def _rounds(a: Process, b: Process, workload: Workload, prompts: Sequence[str], what: str) -> list[Pair]:
    """As many pairs as the workload has rounds."""
    pairs = []
    with progress(what, workload.rounds) as advance:
        for pair in islice(interleaved(a, b, workload, cycle(prompts)), workload.rounds):
            pairs.append(pair)
            advance(1)
    return pairs


def _runs(sides: Iterable[tuple[Sample, Sample]]) -> tuple[Sample, ...]:
    return tuple(chain.from_iterable(sides))


def _energy(process: Process, prompt: str, workload: Workload) -> Energy:
    counter = find_counter(on_gpu=process.on_gpu)
    if isinstance(counter, str):
        return Energy(missing=counter)

    def work() -> int:
        process.run(prompt, workload)
        return workload.output_tokens * workload.batch

    return measure_energy(counter, work)


def _side(
    process: Process,
    samples: tuple[Sample, ...],
    warmups: int,
    peak_rss_mib: float,
    energy: Energy,
    heldout: Sequence[str],
) -> Side:
    spec = ModelSpec.model_validate(process.description["spec"])
    return Side(
        engine=str(process.folder),
        spec=spec,
        bytes_on_disk=folder_bytes(process.folder),
        load_ms=process.description["load_ms"],
        peak_rss_mib=peak_rss_mib,
        on_gpu=process.on_gpu,
        warmup_runs=warmups,
        samples=samples,
        perplexity=Perplexity.model_validate(process.call("score", texts=list(heldout))) if heldout else None,
        bytes_per_token=bytes_per_token(process.folder, spec),
        energy=energy,
    )
