"""Gating: measure an engine against another, or against a committed baseline, and judge it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

from flabc import api, artifact
from flabc.artifact import Artifact
from flabc.errors import ArtifactError, UsageError, require
from flabc.frozen import Frozen
from flabc.perf import gate, gates, verdict_files
from flabc.perf.gate import Check, Timed
from flabc.perf.gates import Gates, QualityGate
from flabc.perf.sequential import LOOKS, Outcome
from flabc.runtime.evaluate.task import KL, EvalOptions
from flabc.runtime.evaluate.task import check as check_task
from flabc.runtime.measure.environment import environment, machine_class
from flabc.runtime.measure.pairs import Opening, measured_openings
from flabc.runtime.measure.result import Workload
from flabc.runtime.measure.stored import (
    PATIENCE,
    Baseline,
    counted,
    measure_baseline,
    never_alone,
    sizes,
    stored_openings,
)

#: How often an engine is opened for a baseline, and at most against itself.
STORED_OPENINGS = 12

#: Units of what is counted.
UNITS = {"parameters": "", "bytes_on_disk": "B", "peak_memory_mib": "MiB"}


class Gated(Frozen):
    """A gate's verdict. ``path`` is the report folder, if one was asked for."""

    verdict: Outcome
    checks: tuple[Check, ...]
    openings: int
    pairs: int
    disturbed: int
    seconds: float
    path: Path | None = None


class Noise(Frozen):
    """An engine against itself: by speed, the rise that could not be told from none, and the limit of the gates."""

    rises: dict[str, float]
    limits: dict[str, float]
    openings: int
    pairs: int
    disturbed: int

    @property
    def too_tight(self) -> list[str]:
        """The speeds whose limit is below the noise; one that asks for a fall is none for an engine against itself."""
        return [name for name, rise in self.rises.items() if 0 <= self.limits[name] <= rise]


def run(
    candidate: str | Path,
    against: str | Path,
    *,
    config: str | Path | Gates,
    output: str | Path | None = None,
    corpus: str = "python-stdlib",
    allow_code_execution: bool = False,
    force: bool = False,
) -> Gated:
    """Judge an engine.

    Args:
        candidate: the engine's folder.
        against: another engine's folder, measured now in turns; or a baseline's JSON, or a folder that has one for
            each class of machine.
        config: a gates file, or its content.
        output: the folder for ``gate.json``, ``junit.xml``, ``summary.md`` and ``benchmark.json``.
        corpus: the text for prompts, of which the held-out side is used.
        allow_code_execution: for tasks that run model-written code.
        force: replace a folder that is not empty.

    Raises:
        UsageError: if quality is to be compared with a baseline's file, which holds none, or a task cannot be run.
        FlabcError: see ``flabc.errors``.
    """
    require("scipy", "eval")
    if output is not None:
        artifact.check_free(output, force=force)
    asked = config if isinstance(config, Gates) else gates.load(Path(config))
    engine, other = Path(candidate), Path(against)
    stored = _stored(other)
    for task, wanted in asked.quality.items():
        options = _options(task, wanted, allow_code_execution)
        check_task(options)
        if stored is not None and (wanted.max_worse is not None or options.name == KL):
            raise UsageError("A baseline's file holds no answers to compare with.", fix="Give --against an engine.")
    checks = [gate.proven(Artifact.open(engine, "engine").manifest.receipts.get("parity"))] if asked.parity else []
    checks += _sizes(engine, stored or other, asked)
    speeds = _speeds(engine, stored or other, asked, corpus)
    checks += [*speeds.checks, *_qualities(engine, None if stored else other, asked, allow_code_execution)]
    if output is not None:
        _write(Path(output), checks, asked, speeds, force=force)
    return Gated(
        verdict=gate.verdict(checks),
        checks=tuple(checks),
        openings=len(speeds.openings),
        pairs=speeds.pairs,
        disturbed=speeds.disturbed,
        seconds=speeds.seconds,
        path=None if output is None else Path(output),
    )


def _write(out: Path, checks: list[Check], asked: Gates, speeds: Timed, *, force: bool) -> None:
    about = {
        "gates": asked.model_dump(mode="json"),
        "environment": environment(),
        "timed": speeds.model_dump(mode="json", exclude={"checks"}),
    }
    with artifact.create(out, "report", force=force) as draft:
        verdict_files.write(checks, draft.path, about)


def noise(engine: str | Path, *, config: str | Path | Gates, corpus: str = "python-stdlib") -> Noise:
    """Measure an engine against itself, until the gates' budget is spent or it was opened often enough.

    Raises:
        EngineError: if the machine is not left alone for long enough.
        FlabcError: see ``flabc.errors``.
    """
    require("scipy", "eval")
    asked = config if isinstance(config, Gates) else gates.load(Path(config))
    kept: list[Opening] = []
    disturbed, began, texts = 0, time.monotonic(), prompts(corpus, asked.workload)
    for tried, opening in enumerate(measured_openings(Path(engine), Path(engine), asked.workload, texts), 1):
        quiet = gate.undisturbed(opening, asked)
        kept += [quiet] if quiet else []
        disturbed += len(opening) - len(quiet)
        spent = time.monotonic() - began >= asked.budget_s and len(kept) >= LOOKS[0]
        if spent or len(kept) == STORED_OPENINGS:
            break
        if not quiet and tried >= PATIENCE * STORED_OPENINGS:
            raise never_alone(min(pair.foreign_cores for pair in opening), asked.max_foreign_cores)
    return Noise(
        rises=gate.noise(kept, asked),
        limits=dict(asked.speed),
        openings=len(kept),
        pairs=sum(map(len, kept)),
        disturbed=disturbed,
    )


def baseline(
    engine: str | Path,
    output: str | Path,
    *,
    config: str | Path | Gates,
    corpus: str = "python-stdlib",
    force: bool = False,
) -> Baseline:
    """Measure an engine for later, and write the file to commit.

    Args:
        engine: its folder.
        output: the file, or a folder with those of other classes of machine; see ``baseline_file``.
        config: a gates file, or its content.
        corpus: the text for prompts, of which the held-out side is used.
        force: replace a file that is there.

    Raises:
        ArtifactError: if the file is there and ``force`` is not given.
        FlabcError: see ``flabc.errors``.
    """
    out = baseline_file(output)
    if out.exists() and not force:
        raise ArtifactError(f"{out} exists.", fix="Choose another name, or pass --force to replace it.")
    asked = config if isinstance(config, Gates) else gates.load(Path(config))
    texts = prompts(corpus, asked.workload)
    most = asked.max_foreign_cores
    made = measure_baseline(Path(engine), asked.workload, texts, openings=STORED_OPENINGS, most=most)
    artifact.write_whole(out, made.model_dump_json(indent=1) + "\n")
    return made


def baseline_file(output: str | Path) -> Path:
    """Where a baseline goes: the file, or in a folder, which is all that does not end in .json, one named by class."""
    out = Path(output)
    return out if out.suffix == ".json" else out / f"{re.sub('[^a-z0-9]+', '-', machine_class().lower())}.json"


def prompts(corpus: str, workload: Workload) -> list[str]:
    """Held-out texts for prompts, one for each round."""
    from flabc.compress.data import corpus as held_out

    return held_out.prompts(corpus, workload.prompt_tokens, workload.rounds)


def _stored(against: Path) -> Baseline | None:
    """A baseline's file, or that of this machine in a folder; None for what is an engine, or should be."""
    if not against.is_dir():
        return Baseline.read(against) if against.suffix == ".json" else None
    files = [file for file in against.iterdir() if not file.name.startswith(".") and file.suffix != ".md"]
    is_engine = Artifact.is_at(against) or any(file.suffix != ".json" for file in files)
    return None if is_engine else Baseline.read(against)


def _openings(engine: Path, against: Path | Baseline, asked: Gates, corpus: str) -> Iterator[Opening]:
    if isinstance(against, Baseline):
        return stored_openings(engine, against, prompts(corpus, against.workload))
    return measured_openings(engine, against, asked.workload, prompts(corpus, asked.workload))


def _speeds(engine: Path, against: Path | Baseline, asked: Gates, corpus: str) -> Timed:
    if not asked.speed:
        return Timed(checks=(), openings=())
    unit = "x roofline" if isinstance(against, Baseline) else "ms"
    return gate.timed(_openings(engine, against, asked, corpus), asked, time.monotonic, unit)


def _sizes(engine: Path, against: Path | Baseline, asked: Gates) -> list[Check]:
    if not asked.size:
        return []
    found = _sizes_of(engine, asked)
    before = against.sizes if isinstance(against, Baseline) else _sizes_of(against, asked)
    return [gate.sized(name, found[name], before[name], UNITS[name], rise) for name, rise in asked.size.items()]


def _sizes_of(engine: Path, asked: Gates) -> dict[str, float]:
    """What is counted of an engine; it is run only if its memory is asked for."""
    if "peak_memory_mib" not in asked.size:
        return counted(engine, Artifact.open(engine, "engine").model)
    return sizes(engine, asked.workload, "x = 1\n" * asked.workload.prompt_tokens)


def _qualities(engine: Path, against: Path | None, asked: Gates, allowed: bool) -> list[Check]:
    checks: list[Check] = []
    for task, wanted in asked.quality.items():
        evaluated = api.evaluate(engine, _options(task, wanted, allowed), baseline=against)
        checks += gate.graded(task, evaluated.rows[0], wanted)
    return checks


def _options(task: str, wanted: QualityGate, allowed: bool) -> EvalOptions:
    return EvalOptions(task=task, corpus=wanted.corpus, limit=wanted.limit, allow_code_execution=allowed)
