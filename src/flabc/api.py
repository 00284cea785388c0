"""The Python API: one function per command of the command line, which is a thin skin over it.

Each takes plain values, writes what it is told to write, and returns a frozen record. Each part is imported when it
is first needed, so that a host that only serves needs only what serving needs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flabc import artifact
from flabc.artifact import Artifact
from flabc.console import note, progress
from flabc.errors import ArtifactError, UsageError, require
from flabc.evaluating import Diff, diff, evaluate, heldout_texts, read_evaluation
from flabc.exports import Exported, export
from flabc.frozen import Frozen
from flabc.perf.load_table import LoadFigures
from flabc.recipe import Recipe
from flabc.recipe import load as load_recipe
from flabc.runtime.doctor import Finding, examine
from flabc.runtime.measure.result import BenchResult, LoadPlan, Workload
from flabc.spec import BYTES_PER_PARAMETER, LayerSpec, ModelSpec

if TYPE_CHECKING:
    from flabc.compress.model import CausalLM
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

#: How often ``bench`` opens engines if nothing is said: as the README's intervals are.
OPENINGS = 5


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
    """What compressing did.

    ``path`` is None after a dry run, ``peak_device_mib`` where no GPU computed: what torch had in use of its memory.
    """

    path: Path | None
    recipe: dict[str, Any]
    dense: ModelSpec
    spec: ModelSpec
    stages: list[dict[str, Any]]
    quality: dict[str, Any]
    peak_device_mib: float | None = None

    @property
    def kept(self) -> float:
        """The fraction of the dense model's parameters that is left."""
        return self.spec.num_parameters / self.dense.num_parameters


class BenchReport(Frozen):
    """Where a benchmark's report is, and what it says; ``load`` has a row for each side of each load."""

    path: Path
    html: Path
    table: dict[str, dict[str, Any]]
    load: tuple[LoadFigures, ...] = ()


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
        location = locate(model, weights=False)
        spec = ModelSpec.from_config(load.read_config(location))
        cosine = duplicate_output_cosine(location.gguf) if location.gguf else None
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

    def narrower(layer: LayerSpec) -> LayerSpec:
        return layer.model_copy(update={"intermediate_size": max(0, layer.intermediate_size - 64)})

    def fewer_groups(layer: LayerSpec) -> LayerSpec:
        if not layer.has_attention:
            return layer
        group = layer.num_attention_heads // layer.num_key_value_heads
        left = {
            "num_attention_heads": layer.num_attention_heads - group,
            "num_key_value_heads": layer.num_key_value_heads - 1,
        }
        return layer.model_copy(update=left)

    rows = min(1000, spec.vocab_size - 1)
    return {
        f"{rows} vocabulary rows": without(vocab_size=spec.vocab_size - rows),
        "one layer": without(layers=spec.layers[1:]),
        "one attention group in every layer": without(layers=tuple(map(fewer_groups, spec.layers))),
        "64 FFN channels in every layer": without(layers=tuple(map(narrower, spec.layers))),
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
        output: the folder to write; None plans and measures everything but training, and writes nothing.
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
    if output is None:
        parsed = _untrained(parsed)
    else:
        artifact.check_free(output, force=force)
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress import devices, load, pipeline

    stream = _checked(model, parsed, output, device, memory=memory, allow_pickle=allow_pickle)
    devices.forget_peak(devices.device_named(device))
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
            peak_device_mib=devices.peak_mib(devices.device_named(device)),
        )
        if done.path is not None:
            _write_checkpoint(cut, done, done.path, seed, _layers(model, cut, dense), force=force)
    return done


def _untrained(recipe: Recipe) -> Recipe:
    """The recipe without its recover stages, which is said: somebody who wants to see a plan does not wait for them."""
    from flabc.compress.config import RecoverConfig

    stages = tuple(stage for stage in recipe.stages if not isinstance(stage, RecoverConfig))
    if len(stages) < len(recipe.stages):
        note("a dry run does not train: what it says is of the model without its recover stages")
    return recipe.model_copy(update={"stages": stages})


def _checked(
    model: str, recipe: Recipe, output: str | Path | None, device: str, *, memory: int | None, allow_pickle: bool
) -> bool:
    """Make sure that memory and disk suffice; whether the weights have to stay on disk for that."""
    from flabc.compress import devices, load, preflight
    from flabc.compress.location import locate
    from flabc.compress.weight_files import can_stream, stored_bytes

    location = locate(model, pickled=allow_pickle)
    spec = ModelSpec.from_config(load.read_config(location))
    size = stored_bytes(location, spec, pickled=allow_pickle)
    stream = preflight.streams(
        spec,
        size,
        recipe.stages,
        recipe.calibration,
        dtype=devices.compute_dtype(devices.device_named(device)),
        memory=memory,
        can_stream=can_stream(location),
    )
    training = preflight.training_bytes(spec, recipe.stages)
    if output is not None:
        # Of a streamed model what is refitted and what is trained lie beside the output for a while.
        needed = preflight.copies(recipe.stages) * size + training if stream else size
        preflight.check_disk(Path(output), needed, fix="Give another output folder.")
    if training and not stream:
        aside = Path(tempfile.gettempdir())
        preflight.check_disk(aside, training, fix="Set TMPDIR to a folder on a larger disk.")
    return stream


def _layers(model: str, cut: CausalLM, dense: CausalLM) -> dict[str, Any] | None:
    """Which layers of the dense model are left, and how many it had; of a model that was cut before, the first one's.

    None where it was cut by a version that did not say so.
    """
    if not Artifact.is_at(model):
        return {"kept": list(cut.layer_origin), "of": len(dense.spec.layers)}
    # The files were read already: hashing all of a large model again would take as long.
    before = artifact.read_manifest(Path(model)).receipts.get("layers")
    return before and {"kept": [before["kept"][layer] for layer in cut.layer_origin], "of": before["of"]}


def _write_checkpoint(
    cut: CausalLM, done: Compressed, output: Path, seed: int, layers: dict[str, Any] | None, *, force: bool
) -> None:
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
        draft.receipts = {"stages": done.stages, "quality": done.quality, "layers": layers}


def bench(
    engine: str | Path,
    baseline: str | Path,
    output: str | Path,
    *,
    workload: Workload | None = None,
    sweep: Sequence[Workload] = (),
    load: LoadPlan | None = None,
    openings: int | None = None,
    budget_s: float | None = None,
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
        load: clients or arrival rates under which latency and requests per second are measured as well.
        openings: how often both are opened, at least once; the workload's rounds are those of each. None for
            ``OPENINGS``, or for as often as the budget allows.
        budget_s: seconds after which engines are not opened once more; the first opening is measured to its end.
        corpus: the text for prompts and perplexity, of which the held-out side is used.
        grid_g_per_kwh: grams of CO2 that the machine's electricity costs a kWh; where energy can be read, the report
            estimates by it what a token costs.
        force: replace a folder that is not empty.

    Raises:
        FlabcError: see ``flabc.errors``.
    """
    artifact.check_free(output, force=force)
    if openings is not None and openings < 1:
        raise UsageError("Engines that are not opened cannot be measured.", expected="at least 1", found=str(openings))
    for package in ("matplotlib", "scipy"):
        require(package, "report")
    from flabc.compress.data import corpus as held_out
    from flabc.perf import load_table, report, table
    from flabc.runtime.measure.bench import bench as measure

    for folder in (engine, baseline):
        Artifact.open(folder, "engine")
    workload = workload or Workload()
    texts = list(heldout_texts(corpus).values())
    longest = max([workload, *sweep], key=lambda each: each.prompt_tokens)
    prompts = held_out.prompts(corpus, longest.prompt_tokens, workload.rounds)
    often = openings if openings is not None or budget_s is not None else OPENINGS
    result = measure(
        Path(engine), Path(baseline), workload, prompts, texts, sweep, load, openings=often, budget_s=budget_s
    )
    result = result.model_copy(update={"grid_g_per_kwh": grid_g_per_kwh})
    with artifact.create(output, "report", force=force) as draft:
        (draft.path / "bench.json").write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
        report.write_html(result, draft.path / "report.html")
        report.write_markdown(result, draft.path / "report.md")
        draft.spec = result.candidate.spec
    rows = table.rows(result)
    return BenchReport(
        path=Path(output),
        html=Path(output) / "report.html",
        table=table.as_dict(rows),
        load=tuple(load_table.figures(result)),
    )


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
    if not file.is_file():
        raise ArtifactError(f"{folder} is no benchmark of two engines.", expected=file.name)
    return BenchResult.model_validate_json(file.read_text(encoding="utf-8"))


def doctor() -> list[Finding]:
    """What this machine can do, and how to get what is missing."""
    return examine()
