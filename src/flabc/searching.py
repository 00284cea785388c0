"""Searching: the rates of a recipe's widths stage found by trying, from a model to a recipe that holds them."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import yaml
from pydantic import Field

from flabc import artifact
from flabc.compress.config import Calibration, Target, VocabConfig, WidthsConfig
from flabc.compress.search.latencies import Latencies
from flabc.console import Advance, note, progress
from flabc.errors import FlabcError, LanguageModelError, UnknownNameError, UsageError, require
from flabc.frozen import Frozen
from flabc.recipe import Recipe
from flabc.recipe import load as load_recipe
from flabc.source import model_folder

if TYPE_CHECKING:
    from flabc.compress.data.corpus import Document
    from flabc.compress.model import CausalLM
    from flabc.compress.search.fitness import Fitness, Rung
    from flabc.compress.search.genome import Genome
    from flabc.compress.search.journal import Journal
    from flabc.compress.search.llm import Client, Dialogue, Message
    from flabc.compress.search.loop import Best
    from flabc.compress.search.operators import Task
    from flabc.compress.search.population import Population
    from flabc.compress.stage import Context

T = TypeVar("T")

#: The files of an output folder.
JOURNAL, RECIPE, CANDIDATES, SUMMARY = "journal.sqlite", "recipe.yaml", "candidates.csv", "search.json"
TRANSCRIPT = "transcript.jsonl"

#: Of a language model that is run here: tokens of a conversation at most, an answer's share of them, the temperature.
LLM_LENGTH, LLM_SHARE, LLM_TEMPERATURE = 16384, 0.25, 0.7

#: What is counted of a dialogue with a language model.
COUNTED = ("asked", "valid", "prompt_tokens", "completion_tokens")


class Options(Frozen):
    """How to search.

    ``sequences`` are the calibration windows that candidates are compared on: all on the first number of them, the
    survivors on the next; ``levels`` the sizes that each place can have; ``evaluate_on`` the corpora of held-out text.
    The operator ``llm`` asks ``llm_model`` at ``llm_url``, or the model in ``llm_folder``, which is run here, or takes
    its replies from a transcript; when that fails for good, the search ends unless a ``fallback`` goes on. With
    ``latencies``, measured where the model will serve, the budget is time instead of parameters. ``ray`` is where so
    many ``workers`` measure candidates, ``local`` or a cluster's address.
    """

    operator: str = "evolution"
    evaluations: int = 400
    offspring: int = 16
    levels: int = 16
    sequences: tuple[int, ...] = (2, 8)
    sub_blocks: bool = False
    evaluate_on: tuple[str, ...] = ()
    llm_url: str | None = None
    llm_model: str | None = None
    llm_folder: str | None = None
    llm_replay: Path | None = None
    fallback: Literal["evolution"] | None = None
    latencies: Latencies | None = None
    ray: str | None = None
    workers: int = Field(2, gt=0)


class Row(Frozen):
    """One genome: parameters of the model after the widths stage, and KL to the dense model in nats per token; with a
    table of latencies, what a step takes by it.
    """

    name: str
    parameters: int
    kl: float
    heldout_kl: float
    milliseconds: float | None = None


class Searched(Frozen):
    """What a search found. ``best`` and ``uniform`` are compared on text that was searched on, and on held-out text.

    ``asked`` counts the answers of a language model, ``valid`` those that could be used.
    """

    path: Path
    recipe: dict[str, Any]
    operator: str
    seed: int
    evaluations: int
    repaired: int
    ffn: tuple[int, ...]
    heads: tuple[int, ...]
    asked: int = 0
    valid: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    best: Row
    uniform: Row


class Shared:
    """What several searches of one model have in common: made once, kept for the next.

    The model and its text, and every place cut to every level, which takes most of a short search's time.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}

    def once(self, what: str, of: Any, make: Callable[[], T]) -> T:
        """What was made of the same, or else made now; the last of its kind is kept."""
        if what not in self._made or self._made[what][0] != of:
            self._made.pop(what, None)  # not two of them in memory
            self._made[what] = (of, make())
        found: T = self._made[what][1]
        return found


def search(
    model: str,
    recipe: str | Path | Recipe,
    output: str | Path,
    options: Options | None = None,
    *,
    target: float | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    shared: Shared | None = None,
) -> Searched:
    """Find the rates of a recipe's widths stage, and write the recipe that holds them.

    The stages before it are run first. Candidates are compared with the model as the last vocabulary stage left it.
    If the stage has rates already, its genome is where ``evolution`` begins: so a search goes on for another target.

    Args:
        model: an alias, a folder, a GGUF file or a hub id.
        recipe: a shipped name, a file, or a recipe, with one widths stage.
        output: the folder to write: journal, recipe, every candidate, and a summary.
        options: how.
        target: the fraction of the parameters to keep, in place of the recipe's target; with ``options.latencies``
            the fraction of the dense model's step.
        overrides: changes to the recipe, ``path=value`` each.
        device: a torch device.
        seed: of the operator, and of the calibration text.
        resume: go on with the journal that is there.
        force: replace what is there.
        shared: what other searches of the model left for this one.

    Raises:
        FlabcError: see ``flabc.errors``; what was evaluated is in the journal.
    """
    options = options or Options()
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    if options.latencies is not None:
        parsed = parsed.model_copy(update={"target": None})  # the rates that are found say what goes
    elif target is not None:
        parsed = parsed.model_copy(update={"target": Target.model_validate({"params": target})})
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress.search.journal import Journal

    at = _widths_at(parsed)
    _check(options, parsed, target)
    out = _folder(Path(output), resume=resume, force=force)
    with Journal(out / JOURNAL) as journal, _dialogue(options, journal, seed) as dialogue:
        return _searched(model, parsed, at, out, options, target, journal, dialogue, device, seed, shared or Shared())


def _searched(
    name: str,
    recipe: Recipe,
    at: int,
    out: Path,
    options: Options,
    target: float | None,
    journal: Journal,
    dialogue: Dialogue | None,
    device: str,
    seed: int,
    shared: Shared,
) -> Searched:
    from flabc.compress import pipeline
    from flabc.compress.search import loop
    from flabc.compress.search.fitness import Fitness
    from flabc.compress.search.population import check_apart
    from flabc.compress.search.registry import OPERATORS

    opened = (name, recipe.calibration, device, seed)
    context = shared.once("model", opened, lambda: _opened(*opened))
    model = context.dense
    left = pipeline.parameters_left(recipe.target, model.spec) if recipe.target else None
    context = replace(context, heldout=_heldout(context, options), target_parameters=left)
    check_apart(context.documents, context.heldout)
    journal.settle(_settings(model, recipe, options, target, context))
    population, task = _prepared(model, recipe, at, options, target, context, shared)
    task = replace(task, dialogue=dialogue)
    with (
        _rungs(population, options) as rungs,
        progress("searching", options.evaluations, covers=True) as advance,
    ):
        teller = _Teller(advance)
        fitness = Fitness(rungs, journal, teller.measured)
        best = loop.search(OPERATORS[options.operator], task, fitness, teller.better)
        genomes = (best.genome, task.allotted("uniform").genome)
        found_row, uniform_row = _rows((options.operator, "uniform"), genomes, population, fitness, options)
    found = Searched(
        path=out,
        recipe=_recipe_with(recipe, at, population, best.genome, options, seed),
        operator=options.operator,
        seed=seed,
        evaluations=best.evaluations,
        repaired=sum(bool(repair) for _, _, repair in journal.candidates()),
        ffn=best.genome.ffn,
        heads=best.genome.heads,
        **({name: getattr(dialogue, name) for name in COUNTED} if dialogue else {}),
        best=found_row,
        uniform=uniform_row,
    )
    _write(found, population, fitness)
    return found


def _opened(name: str, calibration: Calibration, device: str, seed: int) -> Context:
    """The model and its text, without a target."""
    from flabc.compress import load, pipeline

    return pipeline.context_of(load.load(name), None, calibration, device, seed)


def _prepared(
    model: CausalLM,
    recipe: Recipe,
    at: int,
    options: Options,
    target: float | None,
    context: Context,
    shared: Shared,
) -> tuple[Population, Task]:
    """The stages before run, every place cut to every level, and the operator's task."""
    from flabc.compress import pipeline
    from flabc.compress.search import grid
    from flabc.compress.search.latencies import timed
    from flabc.compress.search.operators import Task
    from flabc.compress.search.population import population_of, with_biases

    stage, dense = recipe.stages[at], model
    assert isinstance(stage, WidthsConfig)
    for before in recipe.stages[:at]:
        model, _ = pipeline.run_stages(model, [before], context)
        dense = model if isinstance(before, VocabConfig) else dense
    model = with_biases(model, stage)
    if options.latencies is not None:
        assert target is not None, "it was checked"
        sites = grid.sites_of(model, stage, options.levels, sub_blocks=options.sub_blocks)
        whole, at_first = grid.genome_of(model.spec), grid.genome_of(context.dense.spec)
        space = timed(whole, at_first, sites, options.latencies, target)
    else:
        budget = model.spec.num_parameters - grid.parameters_to_remove(model, stage, context)
        space = grid.space_of(model, stage, budget, options.levels, sub_blocks=options.sub_blocks)
    # The stages before may cut less for a larger target; where they did the same, the places are the same.
    same = (recipe.stages[:at], model.spec, model.layer_origin, model.token_origin)
    cut = (space.sites, stage.score, stage.restore, stage.bias)

    def population_at_all_levels() -> Population:
        note(f"cutting {len(space.sites)} places to up to {max(space.tops)} sizes each")
        return population_of(dense, model, space, stage, context)

    population = shared.once("population", (same, cut), population_at_all_levels)
    population = replace(population, space=space, context=context)
    start = grid.genome_at(space.whole, stage.rates) if stage.rates is not None else None
    return population, Task(space, population.pools, context.seed, options.evaluations, options.offspring, start)


class _Teller:
    """Tells the person how the search goes."""

    def __init__(self, advance: Advance) -> None:
        self.advance, self.done, self.count, self.started = advance, 0, 0, time.monotonic()

    def measured(self, genomes: Sequence[Genome]) -> None:
        """Genomes were measured, on one rung."""
        self.count += len(genomes)

    def better(self, best: Best) -> None:
        """The best so far."""
        rate = self.count / (time.monotonic() - self.started)
        self.advance(best.evaluations - self.done, f"best KL {best.score.kl:.4f}, {rate:.1f} evaluations/s")
        self.done = best.evaluations


def _widths_at(recipe: Recipe) -> int:
    """Which stage is searched.

    Raises:
        UsageError: if the recipe has none, or several.
    """
    found = [at for at, stage in enumerate(recipe.stages) if isinstance(stage, WidthsConfig)]
    if len(found) != 1:
        raise UsageError(
            f"A search finds the rates of one widths stage; the recipe {recipe.name} has {len(found)}.",
            fix="Give a recipe with one.",
        )
    return found[0]


def _check(options: Options, recipe: Recipe, target: float | None) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UnknownNameError: for an unknown operator.
        UsageError: if the numbers of sequences do not rise, or are more than there are, or a budget of time has no
            target.
    """
    from flabc.compress.search.registry import OPERATORS

    if options.operator not in OPERATORS:
        raise UnknownNameError("operator", options.operator, OPERATORS)
    if options.latencies is not None and target is None:
        raise UsageError(
            "A table of latencies says what time is spent on, not how much may be.",
            fix="Give --target: the fraction of the dense model's step to keep.",
        )
    whom = [options.llm_replay, options.llm_folder, options.llm_url and options.llm_model]
    if options.operator == "llm" and len([each for each in whom if each is not None]) != 1:
        raise UsageError(
            "The operator llm has nobody to ask, or several.",
            fix="Give one of --llm-url with --llm-model, --llm-folder, or --llm-replay.",
        )
    rising = (0, *options.sequences)
    if any(before >= after for before, after in pairwise(rising)) or rising[-1] > recipe.calibration.sequences:
        raise UsageError(
            "The sequences to compare on do not fit.",
            expected=f"rising numbers up to calibration.sequences, {recipe.calibration.sequences}",
            found=", ".join(map(str, options.sequences)),
        )


def _folder(out: Path, *, resume: bool, force: bool) -> Path:
    """The output folder, made.

    Raises:
        ArtifactError: if it is not empty, and neither to be replaced nor gone on with.
    """
    if resume and not (out / JOURNAL).is_file():
        note(f"{out} has no journal to go on with: the search begins")
    artifact.check_free(out, force=force or (resume and (out / JOURNAL).is_file()))
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for name in (JOURNAL, f"{JOURNAL}-journal", RECIPE, CANDIDATES, SUMMARY, TRANSCRIPT):
            (out / name).unlink(missing_ok=True)
    return out


def _heldout(context: Context, options: Options) -> Sequence[Document]:
    """The text to evaluate on: the held-out side of the calibration corpora, or all of others."""
    from flabc.compress.data import corpus

    if not options.evaluate_on:
        return context.heldout
    return [document for side in corpus.sides(options.evaluate_on).values() for document in side]


def _settings(
    model: CausalLM, recipe: Recipe, options: Options, target: float | None, context: Context
) -> dict[str, Any]:
    """All that the values in a journal, and their order, depend on; more evaluations, or a fallback, only go on."""
    from flabc.compress.data import corpus

    free = {"evaluations", "evaluate_on", "llm_url", "llm_replay", "fallback", "ray", "workers"}
    timed = {"of_time": target} if options.latencies is not None else {}
    return timed | {
        "model": model.source.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json", exclude={"name", "description"}),
        "calibration": corpus.fingerprint(context.documents),
        "options": options.model_dump(mode="json", exclude=free),
        "seed": context.seed,
        "computed": f"{context.dtype} on {context.device}",
    }


@contextmanager
def _dialogue(options: Options, journal: Journal, seed: int) -> Iterator[Dialogue | None]:
    """The operator ``llm``'s conversation with whom it asks; the others have none."""
    from flabc.compress.search.client import endpoint, transcript
    from flabc.compress.search.llm import Dialogue

    if options.operator != "llm":
        yield None
        return
    fallback = options.fallback is not None
    if options.llm_replay is not None:
        yield Dialogue(transcript(options.llm_replay, len(journal.replies)), journal, fallback)
    elif options.llm_folder is not None:
        with model_folder(options.llm_folder) as source:
            yield Dialogue(_here(source.folder, journal, seed), journal, fallback)
    else:
        assert options.llm_url is not None, "it was checked"
        assert options.llm_model is not None, "it was checked"
        yield Dialogue(endpoint(options.llm_url, options.llm_model, seed), journal, fallback)


def _here(folder: Path, journal: Journal, seed: int) -> Client:
    """A model that is run in this process; its n-th reply is drawn with the seed's n-th successor."""
    from flabc.compress.search.journal import Reply
    from flabc.runtime.backend import Limits
    from flabc.runtime.sampling import SamplingParams
    from flabc.runtime.session import Session

    session = Session.open(folder, limits=Limits(max_length=LLM_LENGTH))

    def ask(messages: Sequence[Message]) -> Reply:
        most = int(LLM_SHARE * session.backend.limits.max_length)  # the rest is for asking again
        params = SamplingParams(max_tokens=most, temperature=LLM_TEMPERATURE, seed=seed + len(journal.replies))
        try:
            said = session.generate([dict(each) for each in messages], params)
        except FlabcError as error:  # no template, or no room for an answer
            raise LanguageModelError(f"The language model in {folder} does not answer: {error}") from error
        return Reply(said.text, said.prompt_tokens, len(said.token_ids))

    return ask


@contextmanager
def _rungs(population: Population, options: Options) -> Iterator[list[Rung]]:
    """The calibration windows in the portions in which candidates see them, here or by workers."""
    from flabc.compress.search import spread
    from flabc.compress.search.fitness import Rung

    tokens = population.context.tokens(population.model)
    portions = [tokens[begin:end] for begin, end in pairwise((0, *options.sequences))]
    if options.ray is None:
        here = [population.on(portion) for portion in portions]
        yield [Rung(each.weight, each.kl) for each in here]
    else:
        with spread.rungs(population, portions, spread.Workers(options.workers, options.ray)) as rungs:
            yield rungs


def _rows(
    names: Sequence[str], genomes: Sequence[Genome], population: Population, fitness: Fitness, options: Options
) -> list[Row]:
    """How genomes do on the text that was searched on, and on held-out text."""
    from flabc.compress.stage import encoder, openings, sequences

    context, space, count = population.context, population.space, options.sequences[-1]
    tokenizer, length = encoder(population.model.tokenizer), context.calibration.sequence_length
    windows = sequences(tokenizer, context.heldout, count, length, context.seed, openings(population.model))
    heldout = population.on(windows).kl(genomes)
    rest = population.model.spec.num_parameters - space.parameters(space.tops)
    return [
        Row(
            name=name,
            parameters=rest + space.parameters(space.levels(genome)),
            kl=fitness([genome])[genome].kl,
            heldout_kl=heldout[genome],
            milliseconds=options.latencies.step_ms(genome) if options.latencies else None,
        )
        for name, genome in zip(names, genomes, strict=True)
    ]


def _recipe_with(
    recipe: Recipe, at: int, population: Population, genome: Genome, options: Options, seed: int
) -> dict[str, Any]:
    """The recipe with a genome's rates in the place of how the stage found them."""
    from flabc.compress.search.grid import rates_of

    stages = [{"stage": stage.stage, **stage.model_dump(mode="json", exclude_defaults=True)} for stage in recipe.stages]
    stage = recipe.stages[at]
    assert isinstance(stage, WidthsConfig)
    found = {key: value for key, value in stages[at].items() if key not in ("rate", "allocation", "slope", "sequences")}
    stages[at] = found | {"rates": rates_of(population.space.whole, genome, stage.of)}
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    name = recipe.name.removesuffix(f"-{options.operator}")
    return content | {
        "name": f"{name}-{options.operator}",
        "description": f"{name} with the rates of each layer found by {options.operator}, seed {seed}.",
        "stages": stages,
    }


def _write(found: Searched, population: Population, fitness: Fitness) -> None:
    """The recipe, every candidate, and the summary; each file whole or as it was."""
    comment = f"# Made by flabc search; compress with --seed {found.seed}.\n"
    artifact.write_whole(
        found.path / RECIPE, comment + yaml.safe_dump(found.recipe, sort_keys=False, default_flow_style=None)
    )
    artifact.write_whole(found.path / SUMMARY, found.model_dump_json(indent=2, exclude={"path"}) + "\n")
    if found.asked:
        replies = (json.dumps(vars(reply)) for _, reply in sorted(fitness.journal.replies.items()))
        artifact.write_whole(found.path / TRANSCRIPT, "".join(f"{line}\n" for line in replies))
    space, known, text = population.space, fitness.journal.known, io.StringIO()
    rest = population.model.spec.num_parameters - space.parameters(space.tops)
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["number", "origin", "repair", "parameters", "rungs", "kl", "genome"])
    for number, (genome, origin, repair) in enumerate(fitness.journal.candidates(), 1):
        reached = sum((genome, at) in known for at in range(len(fitness.rungs)))
        if not reached:  # proposed, cut off, and not come to again: fewer evaluations were asked for
            continue
        kl = fitness.score(genome, reached - 1).kl
        parameters = rest + space.parameters(space.levels(genome))
        table.writerow([number, origin, repair, parameters, reached, kl, genome.key])
    artifact.write_whole(found.path / CANDIDATES, text.getvalue())
