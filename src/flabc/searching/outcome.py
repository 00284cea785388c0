"""What a search leaves behind: the recipe that holds the rates found, every candidate, and a summary."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flabc import artifact
from flabc.frozen import Frozen

from .options import Asked

if TYPE_CHECKING:
    from flabc.compress.search.fitness import Fitness
    from flabc.compress.search.genome import Genome
    from flabc.compress.search.population import Population

#: The files of an output folder.
JOURNAL, RECIPE, CANDIDATES, SUMMARY = "journal.sqlite", "recipe.yaml", "candidates.csv", "search.json"
TRANSCRIPT = "transcript.jsonl"

#: What is counted of a dialogue with a language model.
COUNTED = ("asked", "valid", "prompt_tokens", "completion_tokens")


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


def rows(asked: Asked, genomes: dict[str, Genome], population: Population, fitness: Fitness) -> dict[str, Row]:
    """How genomes do, by their names: on the text that was searched on, and on as much held-out text."""
    from flabc.compress.stage import encoder, openings, sequences

    context, model, options = population.context, population.model, asked.options
    count, length = options.sequences[-1], context.calibration.sequence_length
    windows = sequences(encoder(model.tokenizer), context.heldout, count, length, context.seed, openings(model))
    heldout = population.on(windows).kl(genomes.values())
    return {
        name: Row(
            name=name,
            parameters=population.parameters(genome),
            kl=fitness([genome])[genome].kl,
            heldout_kl=heldout[genome],
            milliseconds=options.latencies.step_ms(genome) if options.latencies else None,
        )
        for name, genome in genomes.items()
    }


def recipe_with(asked: Asked, population: Population, genome: Genome) -> dict[str, Any]:
    """The recipe with a genome's rates in the place of how the stage found them."""
    from flabc.compress.search.grid import rates_of

    recipe, operator = asked.recipe, asked.options.operator
    stages = [{"stage": stage.stage, **stage.model_dump(mode="json", exclude_defaults=True)} for stage in recipe.stages]
    replaced = ("rate", "allocation", "slope", "sequences")
    kept = {key: value for key, value in stages[asked.at].items() if key not in replaced}
    stages[asked.at] = kept | {"rates": rates_of(population.space.whole, genome, asked.stage.of)}
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    name = recipe.name.removesuffix(f"-{operator}")
    return content | {
        "name": f"{name}-{operator}",
        "description": f"{name} with the rates of each layer found by {operator}, seed {asked.seed}.",
        "stages": stages,
    }


def write(found: Searched, population: Population, fitness: Fitness) -> None:
    """Write all of it, each file whole or as it was."""
    comment = f"# Made by flabc search; compress with --seed {found.seed}.\n"
    recipe = yaml.safe_dump(found.recipe, sort_keys=False, default_flow_style=None)
    artifact.write_whole(found.path / RECIPE, comment + recipe)
    artifact.write_whole(found.path / SUMMARY, found.model_dump_json(indent=2, exclude={"path"}) + "\n")
    artifact.write_whole(found.path / CANDIDATES, _candidates(population, fitness))
    if found.asked:
        replies = (json.dumps(vars(reply)) for _, reply in sorted(fitness.journal.replies.items()))
        artifact.write_whole(found.path / TRANSCRIPT, "".join(f"{line}\n" for line in replies))


def _candidates(population: Population, fitness: Fitness) -> str:
    """A line of CSV for every candidate that was measured."""
    text, known = io.StringIO(), fitness.journal.known
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["number", "origin", "repair", "parameters", "rungs", "kl", "genome"])
    for number, (genome, origin, repair) in enumerate(fitness.journal.candidates(), 1):
        reached = sum((genome, at) in known for at in range(len(fitness.rungs)))
        if reached:  # not what was proposed, cut off, and not come to again: fewer evaluations were asked for
            kl = fitness.score(genome, reached - 1).kl
            table.writerow([number, origin, repair, population.parameters(genome), reached, kl, genome.key])
    return text.getvalue()
