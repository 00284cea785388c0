"""Stored baselines: an engine's times as multiples of what the machine could do at best, to compare with another day.

A time in milliseconds says as much of the runner as of the engine. Divided by the least time that the machine's own
bandwidth or arithmetic allows, both measured in the same minutes, what is left is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flabc.artifact import folder_bytes
from flabc.errors import ArtifactError, EngineError
from flabc.frozen import Frozen
from flabc.spec import ModelSpec

from .environment import environment, machine_class
from .foreign import ForeignLoad
from .pairs import Opening, Pair, for_as_long
from .process import Process, opened, warm_up
from .result import Roofline, Sample, Workload
from .roofline import bytes_per_token, measure_roofline

SCHEMA_VERSION = 3

#: So many openings are tried for each that is wanted, since what is measured beside others' work does not count.
PATIENCE = 4

#: What to do where there is no baseline to compare with.
MAKE_ONE = "Make one with flabc gate baseline ENGINE, on the machine that is to judge, or compare two engines."

#: Two runs on one prompt, one after the other.
Twice = tuple[Sample, Sample]


class Baseline(Frozen):
    """A committed baseline.

    Args:
        engine: the folder's name.
        workload: what each run did.
        openings: the runs of each process that was opened, two on each prompt. Times are in multiples of the least that
            the roofline allows; the fields' ``ms`` are such multiples here.
        sizes: of the engine, by metric.
    """

    schema_version: int = SCHEMA_VERSION
    created: datetime
    engine: str
    environment: dict[str, Any]
    workload: Workload
    openings: tuple[tuple[Twice, ...], ...]
    sizes: dict[str, float]

    @classmethod
    def read(cls, file: Path) -> Baseline:
        """Read a baseline's file, or out of a folder of them the one of this class of machine.

        Raises:
            ArtifactError: if it is none, or of another version; or if the folder has several of this class.
            EngineError: if the folder has none of this class.
        """
        if file.is_dir():
            return cls._of_this_class(file)
        try:
            found = cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{file} is no baseline: {error}", fix=MAKE_ONE) from error
        if found.schema_version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{file} is a baseline of another version.",
                expected=f"schema_version {SCHEMA_VERSION}",
                found=str(found.schema_version),
                fix=MAKE_ONE,
            )
        return found

    @classmethod
    def _of_this_class(cls, folder: Path) -> Baseline:
        here, of_here, others = machine_class(), dict[str, Baseline](), list[str]()
        for file in sorted(folder.glob("*.json")):
            try:
                found = cls.read(file)
            except ArtifactError:  # of another version, perhaps: that is no reason to do without this class's
                others.append(f"{file.name}, which cannot be read")
                continue
            if found.machine_class == here:
                of_here[file.name] = found
            else:
                others.append(found.machine_class)
        if len(of_here) > 1:
            raise ArtifactError(
                f"{folder} has several baselines of this class of machine.",
                expected="those of one engine, one for each class",
                found=", ".join(of_here),
                fix="Name the file that is meant.",
            )
        if not of_here:
            raise EngineError(
                f"{folder} has no baseline of this class of machine.",
                expected=here,
                found="; ".join(others) or "no baseline",
                fix=MAKE_ONE,
            )
        (own,) = of_here.values()
        return own

    @property
    def machine_class(self) -> str:
        """What a machine has to be to be compared with it."""
        return machine_class(self.environment)


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


def stored_openings(candidate: Path, baseline: Baseline, prompts: Sequence[str]) -> Iterator[Opening]:
    """Open an engine again and again, and pair its runs with the baseline's, both as multiples of their rooflines.

    Raises:
        EngineError: if the engine cannot be opened or run or runs on a GPU, or the baseline comes from another class
            of machine.
    """
    here, there = machine_class(), baseline.machine_class
    if here != there:
        raise EngineError(
            "The baseline was measured on another class of machine.", expected=there, found=here, fix=MAKE_ONE
        )
    # The one has no end, and so has the other.
    for runs, before in zip(_openings(candidate, baseline.workload, prompts), cycle(baseline.openings), strict=False):
        yield tuple(
            Pair(baseline=stored, candidate=twice, foreign_cores=foreign)
            for (twice, foreign), stored in zip(runs, cycle(before), strict=False)
        )


def measure_baseline(
    engine: Path, workload: Workload, prompts: Sequence[str], *, openings: int, most: float
) -> Baseline:
    """Measure what is to be committed.

    Args:
        engine: the folder.
        workload: what each run does.
        prompts: texts long enough for a prompt each.
        openings: how many to keep.
        most: cores that others may keep busy; what is measured beside more is measured again.

    Raises:
        EngineError: if the engine cannot be run or runs on a GPU, or the machine is not left alone for long enough.
    """
    kept: list[tuple[Twice, ...]] = []
    for tried, runs in enumerate(_openings(engine, workload, prompts), 1):
        if quiet := tuple(twice for twice, foreign in runs if foreign <= most):
            kept.append(quiet)
        if len(kept) == openings:
            break
        if not quiet and tried >= PATIENCE * openings:
            raise never_alone(min(foreign for _, foreign in runs), most)
    return Baseline(
        created=datetime.now(UTC).replace(microsecond=0),
        engine=engine.name,
        environment=environment(),
        workload=workload,
        openings=tuple(kept),
        sizes=sizes(engine, workload, prompts[0]),
    )


def never_alone(found: float, most: float) -> EngineError:
    """What to say where others use the machine whenever something is measured."""
    return EngineError(
        "Others use this machine all the time.",
        expected=f"at most {most:g} busy cores",
        found=f"{found:.1f}",
        fix="Stop them, or raise max_foreign_cores in the gates file.",
    )


def _openings(engine: Path, workload: Workload, prompts: Sequence[str]) -> Iterator[list[tuple[Twice, float]]]:
    """Runs of one process after another, each for as long as opening it took, and the cores others used meanwhile."""
    texts = cycle(prompts)
    while True:
        began = time.monotonic()
        with opened(engine, workload) as process:
            if process.on_gpu:
                raise EngineError(
                    "A baseline holds times in multiples of what the processor can do; this engine runs on a GPU.",
                    fix="Compare two engines, measured in turns: --against ENGINE.",
                )
            warm_up(process, prompts[0], workload)
            took = time.monotonic() - began
            runs = for_as_long(took, _runs(process, workload, texts, measure_roofline()))
        yield runs


def _runs(
    process: Process, workload: Workload, texts: Iterable[str], roofline: Roofline
) -> Iterator[tuple[Twice, float]]:
    """Two runs for each text, as multiples of the roofline, and the cores that others used meanwhile."""
    spec = ModelSpec.model_validate(process.description["spec"])
    weights = bytes_per_token(process.folder, spec)
    for text in texts:
        with ForeignLoad([process.pid]) as foreign:
            runs = process.run(text, workload), process.run(text, workload)
        first, second = (multiples(run, roofline, spec, workload.prompt_tokens, weights) for run in runs)
        yield (first, second), foreign.cores


def sizes(engine: Path, workload: Workload, prompt: str) -> dict[str, float]:
    """All that is counted of an engine: also the most memory that a run takes, MiB."""
    with opened(engine, workload) as process:
        process.run(prompt, workload)  # memory is what serving needs
        spec = ModelSpec.model_validate(process.description["spec"])
        return {**counted(engine, spec), "peak_memory_mib": process.call("memory")["peak_rss_mib"]}


def counted(folder: Path, spec: ModelSpec) -> dict[str, float]:
    """What is counted of an engine without running it: parameters, and bytes on disk."""
    return {"parameters": spec.num_parameters, "bytes_on_disk": folder_bytes(folder)}
