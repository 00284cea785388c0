"""Searching put together: from a model to a recipe that holds the rates found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flabc import artifact
from flabc.compress.config import VocabConfig
from flabc.console import Advance, note, progress
from flabc.errors import require
from flabc.recipe import Recipe
from flabc.recipe import load as load_recipe

from . import outcome
from .options import Asked, Options
from .options import asked as what_is_asked
from .outcome import CANDIDATES, JOURNAL, RECIPE, SUMMARY, TRANSCRIPT, Searched
from .partner import dialogue_with

if TYPE_CHECKING:
    from flabc.compress.data.corpus import Document
    from flabc.compress.model import CausalLM
    from flabc.compress.search.fitness import Rung
    from flabc.compress.search.genome import Genome, Space
    from flabc.compress.search.journal import Journal
    from flabc.compress.search.llm import Dialogue
    from flabc.compress.search.loop import Best
    from flabc.compress.search.operators import Task
    from flabc.compress.search.population import Population
    from flabc.compress.stage import Context

T = TypeVar("T")


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
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    require("torch", "compress")
    require("transformers", "compress")
    from flabc.compress.location import locate
    from flabc.compress.search.journal import Journal

    asked = what_is_asked(model, parsed, options or Options(), target, device, seed)
    locate(model)  # a misspelt name leaves nothing behind
    out = _folder(Path(output), resume=resume, force=force)
    with Journal(out / JOURNAL) as journal, dialogue_with(asked.options, journal, seed) as dialogue:
        return _searched(asked, out, journal, dialogue, shared or Shared())


def _searched(asked: Asked, out: Path, journal: Journal, dialogue: Dialogue | None, shared: Shared) -> Searched:
    """Prepare, search, compare the best with the even rate, and write."""
    from flabc.compress.search import loop
    from flabc.compress.search.fitness import Fitness
    from flabc.compress.search.population import check_apart
    from flabc.compress.search.registry import OPERATORS

    options, operator = asked.options, asked.options.operator
    context = _context(asked, shared)
    check_apart(context.documents, context.heldout)
    journal.settle(_settings(asked, context))
    population = _population(asked, context, shared)
    task = replace(_task(asked, population), dialogue=dialogue)
    with (
        _rungs(population, options) as rungs,
        progress("searching", options.evaluations, covers=True) as advance,
    ):
        teller = _Teller(advance)
        fitness = Fitness(rungs, journal, teller.measured)
        best = loop.search(OPERATORS[operator], task, fitness, teller.better)
        genomes = {"uniform": task.allotted("uniform").genome, operator: best.genome}
        rows = outcome.rows(asked, genomes, population, fitness)
    found = Searched(
        path=out,
        recipe=outcome.recipe_with(asked, population, best.genome),
        operator=operator,
        seed=asked.seed,
        evaluations=best.evaluations,
        repaired=sum(bool(repair) for _, _, repair in journal.candidates()),
        ffn=best.genome.ffn,
        heads=best.genome.heads,
        **({name: getattr(dialogue, name) for name in outcome.COUNTED} if dialogue else {}),
        best=rows[operator],
        uniform=rows["uniform"],
    )
    outcome.write(found, population, fitness)
    return found


def _context(asked: Asked, shared: Shared) -> Context:
    """The model, its text, and the target."""
    from flabc.compress import load, pipeline

    opened = (asked.model, asked.recipe.calibration, asked.device, asked.seed)

    def open_model() -> Context:
        name, calibration, device, seed = opened
        return pipeline.context_of(load.load(name), None, calibration, device, seed)

    context = shared.once("model", opened, open_model)
    target = asked.recipe.target
    left = pipeline.parameters_left(target, context.dense.spec) if target else None
    return replace(context, heldout=_heldout(context, asked.options), target_parameters=left)


def _population(asked: Asked, context: Context, shared: Shared) -> Population:
    """The stages before run, and every place cut to every level."""
    from flabc.compress import pipeline
    from flabc.compress.search.population import population_of, with_biases

    stage, before = asked.candidates, asked.recipe.stages[: asked.at]
    model = dense = context.dense
    for each in before:
        model, _ = pipeline.run_stages(model, [each], context)
        dense = model if isinstance(each, VocabConfig) else dense
    model = with_biases(model, stage)
    space = _space(asked, model, context)
    # The stages before may cut less for a larger target; where they did the same, the places are the same.
    same = (before, model.spec, model.layer_origin, model.token_origin)
    cut = (space.sites, stage.score, stage.restore, stage.bias)

    def at_all_levels() -> Population:
        note(f"cutting {len(space.sites)} places to up to {max(space.tops)} sizes each")
        return population_of(dense, model, space, stage, context)

    population = shared.once("population", (same, cut), at_all_levels)
    return replace(population, space=space, context=context)


def _space(asked: Asked, model: CausalLM, context: Context) -> Space:
    """What can be asked for, within the budget: of parameters, or of time."""
    from flabc.compress.search import grid
    from flabc.compress.search.latencies import timed

    stage, levels, sub_blocks = asked.stage, asked.options.levels, asked.options.sub_blocks
    if asked.options.latencies is None:
        budget = model.spec.num_parameters - grid.parameters_to_remove(model, stage, context)
        return grid.space_of(model, stage, budget, levels, sub_blocks=sub_blocks)
    assert asked.target is not None, "it was checked"
    sites = grid.sites_of(model, stage, levels, sub_blocks=sub_blocks)
    whole, at_first = grid.genome_of(model.spec), grid.genome_of(context.dense.spec)
    return timed(whole, at_first, sites, asked.options.latencies, asked.target)


def _task(asked: Asked, population: Population) -> Task:
    """What the operator is given; without anybody to ask."""
    from flabc.compress.search import grid
    from flabc.compress.search.operators import Task

    space, rates, options = population.space, asked.stage.rates, asked.options
    start = None if rates is None else grid.genome_at(space.whole, rates)
    return Task(space, population.pools, asked.seed, options.evaluations, options.offspring, start)


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


def _settings(asked: Asked, context: Context) -> dict[str, Any]:
    """All that the values in a journal, and their order, depend on; more evaluations, or a fallback, only go on."""
    from flabc.compress.data import corpus

    free = {"evaluations", "evaluate_on", "llm_url", "llm_replay", "fallback", "ray", "workers"}
    timed = {"of_time": asked.target} if asked.options.latencies is not None else {}
    return timed | {
        "model": context.dense.source.model_dump(mode="json"),
        "recipe": asked.recipe.model_dump(mode="json", exclude={"name", "description"}),
        "calibration": corpus.fingerprint(context.documents),
        "options": asked.options.model_dump(mode="json", exclude=free),
        "seed": asked.seed,
        "computed": f"{context.dtype} on {context.device}",
    }


@contextmanager
def _rungs(population: Population, options: Options) -> Iterator[list[Rung]]:
    """The calibration windows in the portions in which candidates see them, here or by workers."""
    from flabc.compress.search import spread
    from flabc.compress.search.fitness import Rung

    tokens = population.context.tokens(population.model)
    portions = [tokens[begin:end] for begin, end in pairwise((0, *options.sequences))]
    if options.ray is None:
        here = [population.on(portion, options.top_k) for portion in portions]
        yield [Rung(each.weight, each.kl) for each in here]
    else:
        workers = spread.Workers(options.workers, options.ray)
        with spread.rungs(population, portions, workers, options.top_k) as rungs:
            yield rungs
