"""Two engines side by side: each in its own process, runs interleaved so that the machine's drift cancels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flabc.console import progress
from flabc.errors import EngineError
from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.spec import ModelSpec

from .energy import find_counter, measure_energy
from .environment import environment
from .foreign import ForeignLoad
from .result import BenchResult, Cell, Energy, Sample, Side, Workload
from .roofline import bytes_per_token, measure_roofline

#: Warm-up ends when a run is within this share of the one before, or after this many runs.
STEADY, MAX_WARMUPS = 0.1, 6


class Process:
    """A worker process and the engine it holds."""

    def __init__(self, folder: Path, *workloads: Workload) -> None:
        command = [sys.executable, "-m", "flabc.runtime.measure.worker"]
        self._pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.folder = folder
        room = {
            "max_length": max(each.prompt_tokens + each.output_tokens for each in workloads),
            "max_batch": max(each.batch for each in workloads),
            "threads": workloads[0].threads,
        }
        try:
            self.description = self.call("open", folder=str(folder), **room)
        except EngineError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._pipe.pid

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Ask the worker for something.

        Raises:
            EngineError: with the worker's own words, or if it died.
        """
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        try:
            self._pipe.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._pipe.stdin.flush()
            line = self._pipe.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"The process that measures {self.folder} died.", found=f"exit code {self._pipe.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.folder}: {reply['error']}")
        return reply

    def run(self, text: str, workload: Workload) -> Sample:
        """One timed run."""
        wanted = workload.model_dump(include={"prompt_tokens", "output_tokens", "batch"})
        return Sample.model_validate(self.call("generate", text=text, **wanted))

    def close(self) -> None:
        """End the process."""
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        with suppress(BrokenPipeError):  # a worker that died cannot be told
            self._pipe.stdin.close()
        self._pipe.wait()
        self._pipe.stdout.close()


def bench(
    candidate: Path,
    baseline: Path,
    workload: Workload,
    prompts: Sequence[str],
    heldout: Sequence[str],
    sweep: Sequence[Workload] = (),
) -> BenchResult:
    """Measure two engines.

    Args:
        candidate: the engine in question.
        baseline: what it is compared with.
        workload: what each run does.
        prompts: texts long enough for a prompt each; run i of both sides takes the same one.
        heldout: texts for perplexity; may be empty.
        sweep: other lengths of prompts and batches, measured after the first in the same way.

    Raises:
        EngineError: if an engine cannot be opened, dies, or does not produce the tokens it should.
    """
    machine, foreign = environment(), list[float]()
    roofline = measure_roofline()
    with opened(baseline, workload, *sweep) as a, opened(candidate, workload, *sweep) as b:
        warmups = {side: warm_up(side, prompts[0], workload) for side in (a, b)}
        samples: dict[Process, list[Sample]] = {a: [], b: []}
        with progress("measuring", 4 * workload.rounds) as advance:
            for turn in range(workload.rounds):
                # ABBA: whatever drifts steadily hits both sides alike.
                with ForeignLoad([a.pid, b.pid]) as others:
                    for side in (a, b, b, a):
                        samples[side].append(side.run(prompts[turn % len(prompts)], workload))
                        advance(1)
                foreign.append(round(others.cores, 3))
        cells = [_cell(a, b, each, prompts) for each in sweep]
        energies = {side: _energy(side, prompts[0], workload) for side in (a, b)}
        sides = [_side(side, samples[side], warmups[side], energies[side], heldout) for side in (a, b)]
    return BenchResult(
        created=datetime.now(UTC).replace(microsecond=0),
        environment=machine,
        workload=workload,
        baseline=sides[0],
        candidate=sides[1],
        roofline=roofline,
        foreign_cores=tuple(foreign),
        sweep=tuple(cells),
    )


def _cell(a: Process, b: Process, workload: Workload, prompts: Sequence[str]) -> Cell:
    """Both sides at another length or batch, interleaved as ever."""
    for side in (a, b):
        warm_up(side, prompts[0], workload)
    samples: dict[Process, list[Sample]] = {a: [], b: []}
    name = f"prompt {workload.prompt_tokens}, batch {workload.batch}"
    with progress(f"measuring {name}", 4 * workload.rounds) as advance:
        for turn in range(workload.rounds):
            for side in (a, b, b, a):
                samples[side].append(side.run(prompts[turn % len(prompts)], workload))
                advance(1)
    shape = workload.model_dump(include={"prompt_tokens", "batch"})
    return Cell(**shape, baseline=tuple(samples[a]), candidate=tuple(samples[b]))


def _energy(process: Process, prompt: str, workload: Workload) -> Energy:
    counter = find_counter()
    if isinstance(counter, str):
        return Energy(missing=counter)

    def work() -> int:
        process.run(prompt, workload)
        return workload.output_tokens

    return measure_energy(counter, work)


def _side(process: Process, samples: Sequence[Sample], warmups: int, energy: Energy, heldout: Sequence[str]) -> Side:
    memory = process.call("memory")  # before scoring, which needs more than serving does
    spec = ModelSpec.model_validate(process.description["spec"])
    return Side(
        engine=str(process.folder),
        spec=spec,
        bytes_on_disk=sum(file.stat().st_size for file in process.folder.rglob("*") if file.is_file()),
        load_ms=process.description["load_ms"],
        peak_rss_mib=memory["peak_rss_mib"],
        warmup_runs=warmups,
        samples=tuple(samples),
        perplexity=Perplexity.model_validate(process.call("score", texts=list(heldout))) if heldout else None,
        bytes_per_token=bytes_per_token(process.folder, spec),
        energy=energy,
    )


def warm_up(process: Process, prompt: str, workload: Workload) -> int:
    """Run until two runs in a row take about as long; how many it took."""
    before = process.run(prompt, workload).total_ms
    for count in range(2, MAX_WARMUPS + 1):
        now = process.run(prompt, workload).total_ms
        if abs(now - before) <= STEADY * before:
            return count
        before = now
    return MAX_WARMUPS


@contextmanager
def opened(folder: Path, *workloads: Workload) -> Iterator[Process]:
    """A worker process for as long as it is needed."""
    process = Process(folder, *workloads)
    try:
        yield process
    finally:
        process.close()
