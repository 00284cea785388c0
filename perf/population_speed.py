"""What a generation of a search costs: candidates one by one, on one walk, and there over the likely tokens alone.

    python perf/population_speed.py qwen2.5-coder-0.5b.gguf --tie

Writes ``perf/results/population.json``. The candidates are offspring of the even rate as evolution makes them. Which
way goes first changes from round to round. Beside the times: whether the likely tokens rank the candidates as all do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from flabc.compress import load, pipeline
from flabc.compress.config import Calibration, WidthsConfig
from flabc.compress.model import CausalLM
from flabc.compress.search.genome import Genome
from flabc.compress.search.grid import space_of
from flabc.compress.search.operators import Task, mutated
from flabc.compress.search.population import Population, population_of
from flabc.runtime.measure.environment import environment

RESULT = Path(__file__).resolve().parent / "results" / "population.json"

#: Of all parameters, those that candidates keep.
LEFT = 0.8

#: Channels go by their activations and are not refitted: how places were cut does not change what candidates take.
STAGE = WidthsConfig(of=("ffn",), score="activation", restore=False, multiple_of=32)

#: As `flabc search` has them by default.
LEVELS, OFFSPRING, TOP_K = 16, 16, 64

#: What is timed, in the order of the first round.
ALONE, TOGETHER, LIKELY = "each_alone_s", "one_walk_s", "likely_tokens_s"


def main() -> None:
    """Time all, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = load.load(asked.model, tie=asked.tie)
    calibration = Calibration(corpus="python-stdlib", sequences=asked.sequences, sequence_length=asked.length)
    found = compare(model, calibration, asked.rounds)
    about = {"model": asked.name, "sequences": asked.sequences, "length": asked.length, "candidates": OFFSPRING}
    RESULT.write_text(json.dumps({"environment": environment(), **about, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def compare(model: CausalLM, calibration: Calibration, rounds: int) -> dict[str, Any]:
    """Seconds of each way in every round, the ratios' medians, and how alike the candidates are ranked."""
    population = _population(model, calibration)
    genomes, tokens = offspring(population), population.context.tokens(model)
    every, likely = population.on(tokens), population.on(tokens, TOP_K)
    ways: dict[str, Callable[[], Mapping[Genome, float]]] = {
        ALONE: lambda: {genome: every.kl([genome])[genome] for genome in genomes},
        TOGETHER: lambda: every.kl(genomes),
        LIKELY: lambda: likely.kl(genomes),
    }
    for measured in (every, likely):  # the dense model's part is made once for a whole search
        measured.kl(genomes[:1])
    said, seconds = dict[str, Mapping[Genome, float]](), dict[str, list[float]]()
    for at in range(rounds):
        for name in (list(ways)[at % len(ways) :] + list(ways))[: len(ways)]:
            began = time.monotonic()
            said[name] = ways[name]()
            seconds.setdefault(name, []).append(round(time.monotonic() - began, 3))
    costs = {name: [said[name][genome] for genome in genomes] for name in ways}
    return {
        **{name: seconds[name] for name in ways},
        "walk_ratio": _ratio(seconds[ALONE], seconds[TOGETHER]),
        "likely_ratio": _ratio(seconds[TOGETHER], seconds[LIKELY]),
        "tokens_compared": likely.tokens_compared,
        "vocab_size": model.spec.vocab_size,
        "rank_correlation": round(float(spearmanr(costs[TOGETHER], costs[LIKELY]).statistic), 4),
        "kl": [round(min(costs[TOGETHER]), 4), round(max(costs[TOGETHER]), 4)],
        "largest_difference": round(max(abs(a - b) for a, b in zip(costs[TOGETHER], costs[LIKELY], strict=True)), 5),
    }


def offspring(population: Population) -> list[Genome]:
    """Children of the even rate, as evolution makes them."""
    parent = Task(population.space, population.pools, 0, OFFSPRING, OFFSPRING).allotted("uniform").genome
    rng, found = np.random.default_rng(0), dict[Genome, None]()
    while len(found) < OFFSPRING:
        found[mutated(population.space, parent, rng).genome] = None
    return list(found)


def _population(model: CausalLM, calibration: Calibration) -> Population:
    context = pipeline.context_of(model, None, calibration, "cpu", 0)
    space = space_of(model, STAGE, round(LEFT * model.spec.num_parameters), LEVELS, sub_blocks=False)
    return population_of(model, model, space, STAGE, context)


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return round(median(a / b for a, b in zip(slow, fast, strict=True)), 3)


def as_text(result: Mapping[str, Any]) -> str:
    """What it says, in a sentence or two."""
    walk, likely = result["walk_ratio"], result["likely_ratio"]
    return (
        f"A search measures {result['candidates']} candidates of {result['model']} {walk:.1f} times faster on one walk "
        f"than one by one,\nand {likely:.1f} times faster again over the {result['tokens_compared']:,} of "
        f"{result['vocab_size']:,} tokens that are likely in its text; both rank the candidates\nalike (Spearman's "
        f"correlation {result['rank_correlation']:.3f}; `perf/population_speed.py`)."
    )


if __name__ == "__main__":
    main()
