"""The Python API: one function per command of the command line, which is a thin skin over it.

Each takes plain values, writes what it is told to write, and returns a frozen record. Each part is imported when it
is first needed, so that a host that only serves needs only what serving needs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc import artifact
from flabc.artifact import Artifact
from flabc.console import progress
from flabc.errors import (
    ArtifactError,
    FlabcError,
    UsageError,
    require,
)
from flabc.exports import Exported, export
from flabc.frozen import Frozen
from flabc.recipe import Recipe
from flabc.recipe import load as load_recipe
from flabc.runtime.doctor import Finding, examine
from flabc.runtime.evaluate.record import Record
from flabc.runtime.evaluate.sandbox import isolation
from flabc.runtime.evaluate.subject import Local, Prompt, Server, is_url
from flabc.runtime.evaluate.task import HARNESS, KL, PERPLEXITY, TASKS, EvalOptions, problems
from flabc.runtime.evaluate.task import check as check_task
from flabc.runtime.measure.environment import environment
from flabc.runtime.measure.result import BenchResult, Workload
from flabc.source import model_folder
from flabc.spec import BYTES_PER_PARAMETER, ModelSpec

if TYPE_CHECKING:
    from flabc.compress.model import CausalLM
    from flabc.perf.evaluation import EvalResult, EvalSide
    from flabc.runtime.measure.shape_result import ShapeResult

__all__ = [
    "BenchReport",
    "Compressed",
    "Diff",
    "Exported",
    "Inspection",
    "bench",
    "bench_shape",
    "compress",
    "diff",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "read_bench",
    "read_evaluation",
]

#: Built-in held-out text that perplexity is measured on: so many documents, each cut to so many characters.
HELDOUT_DOCUMENTS, HELDOUT_CHARACTERS = 24, 2400

#: Characters per prompt token that a text must have to be sure to fill a prompt.
CHARACTERS_PER_TOKEN = 12


class Inspection(Frozen):
    """What a model is made of, and what each kind of cut could save.

    ``savings`` has parameters per cut; ``duplicate_output_cosine`` is set if a GGUF carries an input and an output
    matrix, and says how alike they are.
    """

    model: str
    spec: ModelSpec
    parameters: dict[str, int]
    total_parameters: int
    bytes: dict[str, int]
    kv_bytes_per_token: dict[str, int]
    flops_per_token: int
    savings: dict[str, int]
    duplicate_output_cosine: float | None = None
    can_tie: bool = False


class Compressed(Frozen):
    """What compressing did. ``path`` is None after a dry run."""

    path: Path | None
    recipe: dict[str, Any]
    dense: ModelSpec
    spec: ModelSpec
    stages: list[dict[str, Any]]
    quality: dict[str, Any]

    @property
    def kept(self) -> float:
        """The fraction of the dense model's parameters that is left."""
        return self.spec.num_parameters / self.dense.num_parameters


class Diff(Frozen):
    """Problems that ``after`` solves and ``before`` does not, and the other way round, of ``compared`` ones."""

    before: str
    after: str
    task: str
    compared: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]


class BenchReport(Frozen):
    """Where a benchmark's report is, and what it says."""

    path: Path
    html: Path
    table: dict[str, dict[str, Any]]


def inspect(model: str) -> Inspection:
    """Say what a model is made of, without reading its weights.

    Args:
        model: an alias, a folder, a GGUF file or a hub id.

    Raises:
        ModelError: if it cannot be read.
        UnknownNameError: if the name or the family is not known.
    """
    require("torch", "compress")
    from flabc.compress import load
    from flabc.compress.gguf_file import duplicate_output_cosine
    from flabc.compress.location import locate

    with progress(f"reading {model}"):
        location = locate(model)
        spec = ModelSpec.from_config(load.read_config(location))
        cosine = duplicate_output_cosine(location)
    return Inspection(
        model=model,
        spec=spec,
        parameters={str(part): count for part, count in spec.parameters().items()},
        total_parameters=spec.num_parameters,
        bytes={precision: spec.bytes_at(precision) for precision in BYTES_PER_PARAMETER},
        kv_bytes_per_token={"fp32": spec.kv_bytes_per_token(4), "fp16": spec.kv_bytes_per_token(2)},
        flops_per_token=spec.flops_per_token(),
        savings=savings(spec),
        duplicate_output_cosine=cosine,
        can_tie=cosine is not None and not spec.tie_word_embeddings and cosine >= load.SAME_MATRIX_COSINE,
    )


def savings(spec: ModelSpec) -> dict[str, int]:
    """Parameters that go with each unit of a cut."""

    def without(**changes: Any) -> int:
        return spec.num_parameters - spec.model_copy(update=changes).num_parameters

    def resized(**sizes: int) -> int:
        return without(layers=tuple(layer.model_copy(update=sizes) for layer in spec.layers))

    first = spec.layers[0]
    group = first.num_attention_heads // max(1, first.num_key_value_heads)
    fewer_groups = {
        "num_attention_heads": first.num_attention_heads - group,
        "num_key_value_heads": first.num_key_value_heads - 1,
    }
    rows = min(1000, spec.vocab_size - 1)
    return {
        f"{rows} vocabulary rows": without(vocab_size=spec.vocab_size - rows),
        "one layer": without(layers=spec.layers[1:]),
        "one attention group in every layer": resized(**fewer_groups),
        "64 FFN channels in every layer": resized(intermediate_size=max(0, first.intermediate_size - 64)),
    }


def compress(
    model: str,
    recipe: str | Path | Recipe,
    output: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
    tie: bool = False,
    memory: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
) -> Compressed:
    """Cut a model by a recipe and write the checkpoint.

    Where memory does not suffice for the weights, they stay on disk and are read layer by layer.

    Args:
        model: an alias, a folder, a GGUF file or a hub id.
        recipe: a shipped name, a file, or a recipe.
        output: the folder to write; None plans and measures everything, and writes nothing.
        overrides: changes to the recipe, ``path=value`` each.
        device: a torch device.
        seed: picks the calibration text.
        tie: tie a GGUF's input and output matrices if they are one matrix stored twice.
        memory: bytes that may be used; what is free by default.
        allow_pickle: read weights that are there as pickles only.
        force: replace a folder that is not empty.

    Raises:
        FlabcError: see ``flabc.errors``; the output folder is then as it was.
    """
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if output is not None:
        artifact.check_free(output, force=force)
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress import load, pipeline

    stream = _checked(model, parsed, output, device, memory=memory, allow_pickle=allow_pickle)
    # What a streamed model puts aside lies on the disk of the output, which was asked for room.
    beside = None if output is None else next(folder for folder in Path(output).absolute().parents if folder.exists())
    with tempfile.TemporaryDirectory(prefix="flabc-", dir=beside) as scratch:
        dense = load.load(model, tie=tie, stream=stream, pickled=allow_pickle)
        cut, receipts, quality = pipeline.run(
            dense,
            parsed.stages,
            target=parsed.target,
            calibration=parsed.calibration,
            device=device,
            seed=seed,
            scratch=Path(scratch) if stream else None,
        )
        done = Compressed(
            path=None if output is None else Path(output),
            recipe=parsed.model_dump(mode="json"),
            dense=dense.spec,
            spec=cut.spec,
            stages=[receipt.as_dict() for receipt in receipts],
            quality=quality,
        )
        if done.path is not None:
            _write_checkpoint(cut, done, done.path, seed, force=force)
    return done


def _checked(
    model: str, recipe: Recipe, output: str | Path | None, device: str, *, memory: int | None, allow_pickle: bool
) -> bool:
    """Make sure that memory and disk suffice; whether the weights have to stay on disk for that."""
    from flabc.compress import load, pipeline, preflight
    from flabc.compress.location import locate
    from flabc.compress.weight_files import can_stream, stored_bytes

    location = locate(model)
    spec = ModelSpec.from_config(load.read_config(location))
    size = stored_bytes(location, spec, pickled=allow_pickle)
    stream = preflight.streams(
        spec,
        size,
        recipe.stages,
        recipe.calibration,
        dtype=pipeline.compute_dtype(pipeline.device_named(device)),
        memory=memory,
        can_stream=can_stream(location),
    )
    if output is not None:
        preflight.check_disk(Path(output), size, scratch=stream)
    return stream


def _write_checkpoint(cut: CausalLM, done: Compressed, output: Path, seed: int, *, force: bool) -> None:
    from flabc.compress import card, checkpoint

    with artifact.create(output, "checkpoint", force=force) as draft:
        checkpoint.write(cut, draft.path)
        card.write(
            draft.path,
            done.dense,
            done.spec,
            origin=cut.layer_origin,
            source=cut.source.name,
            recipe=done.recipe,
            stages=done.stages,
            quality=done.quality["heldout_bits_per_byte"],
        )
        draft.spec, draft.recipe, draft.source, draft.seed = done.spec, done.recipe, cut.source, seed
        draft.receipts = {"stages": done.stages, "quality": done.quality}


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


def bench(
    engine: str | Path,
    baseline: str | Path,
    output: str | Path,
    *,
    workload: Workload | None = None,
    sweep: Sequence[Workload] = (),
    corpus: str = "python-stdlib",
    grid_g_per_kwh: float | None = None,
    force: bool = False,
) -> BenchReport:
    """Measure an engine beside another and write the report.

    Args:
        engine: the engine in question.
        baseline: the engine it is compared with.
        output: the folder for ``report.html``, ``report.md`` and ``bench.json``.
        workload: what each run does.
        sweep: other lengths of prompts and batches, measured as well.
        corpus: the text for prompts and perplexity, of which the held-out side is used.
        grid_g_per_kwh: grams of CO2 that the machine's electricity costs a kWh; where energy can be read, the report
            estimates by it what a token costs.
        force: replace a folder that is not empty.

    Raises:
        FlabcError: see ``flabc.errors``.
    """
    artifact.check_free(output, force=force)
    require("matplotlib", "report")
    from flabc.perf import report, table
    from flabc.runtime.measure.bench import bench as measure

    for folder in (engine, baseline):
        Artifact.open(folder, "engine")
    workload = workload or Workload()
    texts = list(heldout_texts(corpus).values())
    longest = max([workload, *sweep], key=lambda each: each.prompt_tokens)
    prompts = prompt_texts(corpus, longest.model_copy(update={"rounds": workload.rounds}))
    result = measure(Path(engine), Path(baseline), workload, prompts, texts, sweep)
    result = result.model_copy(update={"grid_g_per_kwh": grid_g_per_kwh})
    with artifact.create(output, "report", force=force) as draft:
        (draft.path / "bench.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        report.write_html(result, draft.path / "report.html")
        report.write_markdown(result, draft.path / "report.md")
        draft.spec = result.candidate.spec
    rows = table.rows(result)
    return BenchReport(path=Path(output), html=Path(output) / "report.html", table=table.as_dict(rows))


def bench_shape(
    shape: str, cut: str, *, workload: Workload | None = None, output: str | Path | None = None, force: bool = False
) -> ShapeResult:
    """What a cut would buy on this machine before anything is pruned: random weights of a published model's shape.

    A GPU is taken where torch sees one, else the processor. What does not fit into memory is measured by some of its
    layers, and the result is calculated from them and says so.

    Args:
        shape: a name of ``flabc.runtime.measure.shapes.SHAPES``.
        cut: a name of ``CUTS`` there, or a share of the parameters, as ``"0.3"``.
        workload: what each run does.
        output: a folder for ``shape.json``; without one nothing is written.
        force: replace a folder that is not empty.

    Raises:
        FlabcError: see ``flabc.errors``.
    """
    if output is not None:
        artifact.check_free(output, force=force)
    require("torch", "compress")
    from flabc.runtime.measure import shape_bench

    result = shape_bench.bench_shape(shape, cut, workload or Workload())
    if output is not None:
        with artifact.create(output, "report", force=force) as draft:
            (draft.path / "shape.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
            draft.spec = result.pruned.spec
    return result


def read_bench(folder: str | Path) -> BenchResult:
    """The raw result of a report folder, verified.

    Raises:
        ArtifactError: if the folder is damaged or is no report.
    """
    file = Artifact.open(folder, "report").path / "bench.json"
    return BenchResult.model_validate_json(file.read_text(encoding="utf-8"))


def doctor() -> list[Finding]:
    """What this machine can do, and how to get what is missing."""
    return examine()


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


def prompt_texts(corpus: str, workload: Workload) -> list[str]:
    """Held-out texts that are long enough for a prompt, one for each round.

    Raises:
        FlabcError: if there is none.
    """
    from flabc.compress.data.corpus import load

    size = CHARACTERS_PER_TOKEN * workload.prompt_tokens
    texts = [document.text[:size] for document in load(corpus, "heldout") if len(document.text) >= size]
    if not texts:
        raise FlabcError(f"No held-out text is long enough for a prompt of {workload.prompt_tokens} tokens.")
    return texts[: workload.rounds]
