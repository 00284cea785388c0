"""Stored baselines: an engine's times as multiples of what the machine could do at best, to compare with another day.

A time in milliseconds says as much of the runner as of the engine. Divided by the least time that the machine's own
bandwidth or arithmetic allows, both measured in the same minutes, what is left is the engine's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flabc.artifact import folder_bytes
from flabc.errors import ArtifactError, EngineError
from flabc.frozen import Frozen
from flabc.spec import ModelSpec

from .environment import environment
from .foreign import ForeignLoad
from .pairs import Pair
from .process import Process, opened, warm_up
from .result import Roofline, Sample, Workload
from .roofline import bytes_per_token, measure_roofline

SCHEMA_VERSION = 1

#: Pairs of runs between two measurements of the roofline: machines change their pace.
RENEWED = 4

#: So many pairs are tried for each that is wanted, since those measured beside others' work do not count.
PATIENCE = 4


class Baseline(Frozen):
    """A committed baseline.

    Args:
        engine: the folder's name.
        workload: what each run did.
        runs: times in multiples of the least that the roofline allows; the fields' ``ms`` are such multiples here.
        sizes: of the engine, by metric.
    """

    schema_version: int = SCHEMA_VERSION
    created: datetime
    engine: str
    environment: dict[str, Any]
    workload: Workload
    runs: tuple[Sample, ...]
    sizes: dict[str, float]

    @classmethod
    def read(cls, file: Path) -> Baseline:
        """Read a baseline's file.

        Raises:
            ArtifactError: if it is none.
        """
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ArtifactError(
                f"{file} is no baseline: {error}", fix="Make one with flabc gate baseline ENGINE."
            ) from error


def multiples(sample: Sample, roofline: Roofline, spec: ModelSpec, prompt_tokens: int, weights: int) -> Sample:
    """A run's times over the least that the roofline allows.

    Args:
        sample: the run.
        roofline: of the same minutes.
        spec: the model's shapes, for the operations of its prompt.
        prompt_tokens: tokens of the prompt.
        weights: bytes that every output token reads.
    """
    least_ttft = 1000 * spec.flops_per_token() * prompt_tokens / (roofline.gflops * 1e9)
    least_tpot = 1000 * weights / 2**30 / roofline.bandwidth_gib_s
    return Sample(ttft_ms=sample.ttft_ms / least_ttft, token_ms=tuple(token / least_tpot for token in sample.token_ms))


@contextmanager
def stored_pairs(candidate: Path, baseline: Baseline, prompts: Sequence[str]) -> Iterator[Iterator[Pair]]:
    """Open an engine and yield pairs of its runs and the baseline's, both as multiples of their rooflines.

    Raises:
        EngineError: if the engine cannot be opened or run or runs on a GPU, or the baseline comes from another
            processor.
    """
    here, there = environment()["cpu"], baseline.environment["cpu"]
    if here != there:
        raise EngineError(
            "The baseline was measured on another processor.",
            expected=there,
            found=here,
            fix="Make one for this class of machine, or compare two engines.",
        )
    with opened(candidate, baseline.workload) as process:
        warm_up(process, prompts[0], baseline.workload)
        yield _against(process, baseline, prompts)


def _against(process: Process, baseline: Baseline, prompts: Sequence[str]) -> Iterator[Pair]:
    for turn, (runs, foreign) in enumerate(_runs(process, baseline.workload, prompts)):
        at = 2 * turn % (len(baseline.runs) - 1)
        before = baseline.runs[at], baseline.runs[at + 1]
        yield Pair(baseline=before, candidate=runs, foreign_cores=foreign)


def measure_baseline(engine: Path, workload: Workload, prompts: Sequence[str], *, pairs: int, most: float) -> Baseline:
    """Measure what is to be committed.

    Args:
        engine: the folder.
        workload: what each run does.
        prompts: texts long enough for a prompt each.
        pairs: pairs of runs to keep.
        most: cores that others may keep busy; pairs beside more are measured again.

    Raises:
        EngineError: if the engine cannot be run or runs on a GPU, or the machine is not left alone for long enough.
    """
    kept: list[Sample] = []
    with opened(engine, workload) as process:
        warm_up(process, prompts[0], workload)
        for tried, (runs, foreign) in enumerate(_runs(process, workload, prompts)):
            if foreign <= most:
                kept += runs
            if len(kept) == 2 * pairs:
                break
            if tried > PATIENCE * pairs:
                raise never_alone(foreign, most)
        sizes = sizes_of(process)
    return Baseline(
        created=datetime.now(UTC).replace(microsecond=0),
        engine=engine.name,
        environment=environment(),
        workload=workload,
        runs=tuple(kept),
        sizes=sizes,
    )


def never_alone(found: float, most: float) -> EngineError:
    """What to say where others use the machine whenever something is measured."""
    return EngineError(
        "Others use this machine all the time.",
        expected=f"at most {most:g} busy cores",
        found=f"{found:.1f}",
        fix="Stop them, or raise max_foreign_cores in the gates file.",
    )


def _runs(
    process: Process, workload: Workload, prompts: Sequence[str]
) -> Iterator[tuple[tuple[Sample, Sample], float]]:
    """Two runs at a time, as multiples of the roofline, and the cores that others used meanwhile."""
    if process.on_gpu:
        raise EngineError(
            "A baseline holds times in multiples of what the processor can do; this engine runs on a GPU.",
            fix="Compare two engines, measured in turns: --against ENGINE.",
        )
    spec = ModelSpec.model_validate(process.description["spec"])
    weights = bytes_per_token(process.folder, spec)
    for turn in count():
        if turn % RENEWED == 0:
            roofline = measure_roofline()
        text = prompts[turn % len(prompts)]
        with ForeignLoad([process.pid]) as foreign:
            runs = process.run(text, workload), process.run(text, workload)
        first, second = (multiples(run, roofline, spec, workload.prompt_tokens, weights) for run in runs)
        yield (first, second), foreign.cores


def sizes_of(process: Process) -> dict[str, float]:
    """All that is counted of an engine: also the most memory its process has held, MiB."""
    spec = ModelSpec.model_validate(process.description["spec"])
    return {**counted(process.folder, spec), "peak_memory_mib": process.call("memory")["peak_rss_mib"]}


def counted(folder: Path, spec: ModelSpec) -> dict[str, float]:
    """What is counted of an engine without running it: parameters, and bytes on disk."""
    return {"parameters": spec.num_parameters, "bytes_on_disk": folder_bytes(folder)}
