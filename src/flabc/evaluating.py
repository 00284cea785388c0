"""Evaluating: one task asked of a model and, beside it, of what it is compared with; two evaluations compared."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from flabc import artifact
from flabc.artifact import Artifact
from flabc.errors import ArtifactError, UsageError, require
from flabc.frozen import Frozen
from flabc.runtime.evaluate.record import Record
from flabc.runtime.evaluate.sandbox import isolation
from flabc.runtime.evaluate.subject import Local, Prompt, Server, is_url
from flabc.runtime.evaluate.task import HARNESS, KL, PERPLEXITY, TASKS, EvalOptions, problems
from flabc.runtime.evaluate.task import check as check_task
from flabc.runtime.measure.environment import environment
from flabc.source import model_folder

if TYPE_CHECKING:
    from flabc.perf.evaluation import EvalResult, EvalSide

#: Built-in held-out text that perplexity is measured on: so many documents, each cut to so many characters.
HELDOUT_DOCUMENTS, HELDOUT_CHARACTERS = 24, 2400


class Diff(Frozen):
    """Problems that ``after`` solves and ``before`` does not, and the other way round, of ``compared`` ones."""

    before: str
    after: str
    task: str
    compared: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]


def evaluate(
    target: str | Path,
    options: EvalOptions | None = None,
    *,
    baseline: str | Path | None = None,
    output: str | Path | None = None,
    tie: bool = False,
    force: bool = False,
) -> EvalResult:
    """Measure quality: an engine through ONNX Runtime, a server through its API, anything else through torch.

    With an ``output`` a run that was cut off goes on where it was: what is not finished lies in ``OUTPUT.partial``.

    Args:
        target: an engine, a checkpoint, whatever ``compress`` takes as a model, or the URL of a server that speaks
            OpenAI's API.
        options: the task and how it is run; both sides get the same.
        baseline: what it is compared with.
        output: the folder for ``report.html``, ``report.md``, ``eval.json`` and the records of both sides.
        tie: as for ``compress``.
        force: replace a folder that is not empty, and begin a run anew that was cut off.

    Raises:
        UnknownNameError: for an unknown task, choice or corpus.
        UsageError: if the task runs model-written code and that is not allowed, or lacks something.
        CorpusError: if the task's file is missing or is no such file.
        FlabcError: see ``flabc.errors``.
    """
    require("scipy", "eval")
    from flabc.perf import comparison, evaluation

    options = options or EvalOptions()
    check_task(options)
    if options.name == KL and baseline is None:
        raise UsageError("KL compares two models.", fix="Give --baseline.")
    if output is not None:
        artifact.check_free(output, force=force)
    models = {"target": str(target)} | ({} if baseline is None else {"baseline": str(baseline)})
    identity = {"options": options.identity(), **_identities(models)}
    with artifact.unfinished(output, identity, force=force) as folder:
        measured = _measure(models, options, folder, tie=tie)
        records = {side: rows for side, (_, rows) in measured.items()}
        result = evaluation.EvalResult(
            created=datetime.now(UTC).replace(microsecond=0),
            environment=environment(),
            options=options,
            target=measured["target"][0],
            baseline=measured["baseline"][0] if "baseline" in measured else None,
            rows=tuple(comparison.compare(options, records["target"], records.get("baseline"))),
            unprotected=isolation().missing if options.allow_code_execution else (),
        )
        if output is not None:
            with artifact.create(output, "report", force=force) as draft:
                evaluation.write(result, records, draft.path)
    return result


def diff(before: str | Path, after: str | Path) -> Diff:
    """The problems that one evaluation's target solves and the other's does not.

    Raises:
        ArtifactError: if a folder is damaged or is no evaluation.
        UsageError: if they are of different tasks.
    """
    from flabc.perf.evaluation import pairs, read_records

    results = [read_evaluation(folder) for folder in (before, after)]
    tasks = [result.options.task for result in results]
    if tasks[0] != tasks[1]:
        raise UsageError("These evaluations are of different tasks.", expected=tasks[0], found=tasks[1])
    found = list(pairs(read_records(Path(after)), read_records(Path(before))))
    if not any(pair.baseline for pair in found):
        raise UsageError("These evaluations have no graded problem in common.", expected="tasks that pass or fail")
    by_state = {state: tuple(pair.task_id for pair in found if pair.state == state) for state in ("gained", "lost")}
    return Diff(
        before=results[0].target.model,
        after=results[1].target.model,
        task=tasks[0],
        compared=sum(bool(pair.baseline) for pair in found),
        **by_state,
    )


def read_evaluation(folder: str | Path) -> EvalResult:
    """The result of an evaluation's folder, verified.

    Raises:
        ArtifactError: if the folder is damaged or is no evaluation.
    """
    from flabc.perf.evaluation import RESULT, EvalResult

    file = Artifact.open(folder, "report").path / RESULT
    if not file.is_file():
        raise ArtifactError(f"{folder} is no evaluation.", expected=RESULT)
    return EvalResult.model_validate_json(file.read_text(encoding="utf-8"))


def heldout_texts(corpus: str, limit: int | None = None) -> dict[str, str]:
    """The text that perplexity is measured on, by name: the held-out side of a corpus, never calibrated on.

    Of a built-in corpus it is the begin of a few documents; of a file or folder, all of it.
    """
    from flabc.compress.data.corpus import CORPORA, load

    documents = load(corpus, "heldout")
    built_in = corpus in CORPORA
    count = limit or (HELDOUT_DOCUMENTS if built_in else len(documents))
    size = HELDOUT_CHARACTERS if built_in else None
    return {f"{n} {document.name}": document.text[:size] for n, document in enumerate(documents[:count])}


def _measure(
    models: dict[str, str], options: EvalOptions, folder: Path, *, tie: bool
) -> dict[str, tuple[EvalSide, list[Record]]]:
    """Every side's records, the baseline's first; KL needs both models at once."""
    from flabc.runtime.evaluate import reading

    if options.name == KL:
        texts = heldout_texts(options.corpus, options.limit)
        with _subject(models["baseline"], options, tie) as dense, _subject(models["target"], options, tie) as subject:
            records = reading.read_kl(texts, dense, subject, folder, "target")
            return {"target": (_side(models["target"], subject), records)} | {
                "baseline": (_side(models["baseline"], dense), [])
            }
    return {label: _measure_one(label, models[label], options, folder / label, tie=tie) for label in sorted(models)}


def _measure_one(
    label: str, model: str, options: EvalOptions, folder: Path, *, tie: bool
) -> tuple[EvalSide, list[Record]]:
    """One side's records; the model is gone from memory when this returns."""
    from flabc.runtime.evaluate import generation, harness, reading

    folder.mkdir(exist_ok=True)
    resumed = any(folder.iterdir())
    asked = problems(options) if options.name in TASKS else []
    with _subject(model, options, tie, [generation.prompt_of(problem, options) for problem in asked]) as subject:
        started, tokens = time.monotonic(), None
        if options.name == PERPLEXITY:
            texts = heldout_texts(options.corpus, options.limit)
            records = reading.read_perplexity(texts, subject, folder, label)
        elif options.name == HARNESS:
            records = harness.run(subject, options)
        else:
            records, tokens = generation.run(asked, subject, options, folder, label)
        seconds = None if resumed else time.monotonic() - started
        return _side(model, subject, tokens, seconds), records


def _side(model: str, subject: Local | Server, tokens: int | None = None, seconds: float | None = None) -> EvalSide:
    from flabc.perf.evaluation import EvalSide

    parameters = subject.session.spec.num_parameters if isinstance(subject, Local) else None
    return EvalSide(model=model, parameters=parameters, tokens=tokens, seconds=seconds)


@contextmanager
def _subject(model: str, options: EvalOptions, tie: bool, prompts: Sequence[Prompt] = ()) -> Iterator[Local | Server]:
    if is_url(model):
        yield Server(model, options)
        return
    with model_folder(model, tie=tie) as source:
        yield Local(source.folder, options, prompts)


def _identities(models: dict[str, str]) -> dict[str, str]:
    """What tells two versions of a model apart without reading its weights."""
    found = {}
    for side, model in models.items():
        path = Path(model)
        if Artifact.is_at(path):
            found[side] = artifact.sha256(path / artifact.MANIFEST)
        else:
            files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
            stats = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
            found[side] = "\n".join([model, *stats])
    return found
