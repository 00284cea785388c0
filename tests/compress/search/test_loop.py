"""Operators on a landscape whose best point is known, their repeatability, and what is measured how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flabc.compress.allocate import Pool
from flabc.compress.search.fitness import AT_ONCE, Fitness, Rung, Score
from flabc.compress.search.genome import Genome, Site, Space
from flabc.compress.search.journal import Journal
from flabc.compress.search.loop import Best, search
from flabc.compress.search.operators import Task, mutated
from flabc.compress.search.registry import OPERATORS
from flabc.errors import ArtifactError, UsageError

#: Operators that ask nobody.
OWN = [name for name in OPERATORS if name != "llm"]

LAYERS, TOP = 6, 10

SITES = tuple(
    Site((kind, layer), tuple(range(1, TOP + 1)), tuple(price * size for size in range(1, TOP + 1)))
    for kind, price in (("ffn", 4), ("heads", 6))
    for layer in range(LAYERS)
)
SPACE = Space(Genome((TOP,) * LAYERS, (TOP,) * LAYERS), SITES, 400)
POOLS = tuple(
    Pool(site.place[1], TOP, site.parameters[0], worth=torch.arange(1.0, TOP + 1) * (1 + site.place[1]))
    for site in SITES
)

#: What a missing unit costs: first layers and heads most.
WEIGHTS = {site.place: (3.0 if site.place[0] == "heads" else 1.0) / (1 + site.place[1]) ** 2 for site in SITES}


def cost(genome: Genome) -> float:
    return sum(WEIGHTS[site.place] * (TOP - genome.units(site.place)) ** 2 for site in SITES)


class Landscape:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[Genome] = []

    def __call__(self, genomes: Sequence[Genome]) -> dict[Genome, float]:
        assert len(genomes) <= AT_ONCE
        self.asked += genomes
        return {genome: cost(genome) for genome in genomes}


def task(**fields: object) -> Task:
    given: dict[str, object] = {"seed": 5, "evaluations": 300, "offspring": 16, **fields}
    return Task(SPACE, POOLS, **given)  # type: ignore[arg-type]


def run(operator: str, *, rungs: int = 1, file: Path = Path(":memory:"), **fields: object) -> tuple[Best, Landscape]:
    seen = Landscape()
    with Journal(file) as journal:
        return search(OPERATORS[operator], task(**fields), Fitness([Rung(10, seen)] * rungs, journal)), seen


def optimum() -> float:
    """The least cost on the budget, by dynamic programming over what was spent."""
    best = np.full(SPACE.budget + 1, np.inf)
    best[0] = 0
    for site in SITES:
        now = np.full_like(best, np.inf)
        for size, price in zip(site.sizes, site.parameters, strict=True):
            now[price:] = np.minimum(now[price:], best[: len(best) - price] + WEIGHTS[site.place] * (TOP - size) ** 2)
        best = now
    return float(best.min())


def test_evolution_comes_near_the_optimum_and_the_others_do_not() -> None:
    costs = {name: run(name, evaluations=600)[0].score.kl for name in OWN}
    least = optimum()
    assert least <= costs["evolution"] < 1.05 * least
    assert all(costs[name] > 1.1 * least for name in OWN if name != "evolution")
    assert costs["ramp"] < costs["uniform"]  # here a slope helps


@pytest.mark.parametrize("name", OWN)
def test_runs_repeat_by_their_seed(name: str) -> None:
    first, again = run(name), run(name)
    assert first[0] == again[0]
    assert first[1].asked == again[1].asked
    if name in ("evolution", "random"):
        assert run(name, seed=6)[1].asked != first[1].asked


@pytest.mark.parametrize(
    ("name", "count"), [("uniform", 1), ("global", 1), ("ramp", 32), ("random", 40), ("evolution", 40)]
)
def test_no_genome_is_evaluated_twice_or_beyond_the_number(name: str, count: int) -> None:
    best, seen = run(name, evaluations=40)
    assert len(seen.asked) == len(set(seen.asked)) == best.evaluations <= count
    assert best.evaluations == count or name == "ramp"  # slopes may come to the same genome
    assert best.score.missed == 0
    assert best.score.kl == pytest.approx(min(map(cost, seen.asked)))


def test_simple_allocations_are_what_their_papers_say() -> None:
    even = run("uniform")[1].asked[0]
    assert max(even.ffn + even.heads) - min(even.ffn + even.heads) <= 2  # what the grid left over goes somewhere
    halves = [sum(even.ffn[half] + even.heads[half]) for half in (slice(0, 3), slice(3, 6))]
    assert abs(halves[0] - halves[1]) <= 2  # and not to one end
    # Worth that differs by a factor between layers is the same when standardised (FLAP).
    flap = run("global")[1].asked[0]
    assert max(flap.ffn + flap.heads) - min(flap.ffn + flap.heads) <= 2
    for genome in run("ramp", evaluations=9)[1].asked:
        steps = np.diff(genome.ffn)
        assert (steps >= -1).all() or (steps <= 1).all()  # but for the rounding, one direction
    ends = run("ramp", evaluations=9)[1].asked
    assert ends[0].ffn[0] < ends[0].ffn[-1]
    assert ends[-1].ffn[0] > ends[-1].ffn[-1]


@given(seed=st.integers(0, 10_000))
def test_mutations_stay_on_the_budget_and_near(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent = SPACE.decode([int(rng.integers(0, top + 1)) for top in SPACE.tops], rng.permutation(12).tolist()).genome
    child = mutated(SPACE, parent, rng).genome
    levels = SPACE.levels(child)
    assert 0 <= SPACE.budget - SPACE.parameters(levels) < 4
    moved = np.abs(np.array(levels) - SPACE.levels(parent))
    assert moved.sum() <= 3 * 2 + 6  # switches, and the repair of unequal steps


def test_evolution_begins_where_it_is_told() -> None:
    start = run("evolution")[0].genome
    tighter = Task(replace(SPACE, budget=380), POOLS, 1, 1, 16, start)
    with Journal(Path(":memory:")) as journal:
        found = search(OPERATORS["evolution"], tighter, Fitness([Rung(1, Landscape())], journal))
        assert [(origin, bool(repair)) for _, origin, repair in journal.candidates()] == [("start", True)]
    assert found.score.kl < run("uniform")[0].score.kl  # though on a lower budget


def test_survivors_alone_see_more_tokens() -> None:
    first, second = Landscape(), Landscape()
    with Journal(Path(":memory:")) as journal:
        # The second rung weighs three times the first, and has another opinion.
        fitness = Fitness(
            [Rung(10, first), Rung(30, lambda some: {g: 2 * c for g, c in second(some).items()})], journal
        )
        genomes = [mutated(SPACE, SPACE.decode([5] * 12).genome, np.random.default_rng(at)).genome for at in range(40)]
        genomes = list(dict.fromkeys(genomes))[:20]
        scores = fitness(genomes)
    assert first.asked == genomes
    assert second.asked == sorted(genomes, key=lambda genome: (cost(genome), genome))[:5]
    for genome, score in scores.items():
        told = Score(0, (10 + 60) / 40 * cost(genome)) if genome in second.asked else Score(1, cost(genome))
        assert (score.missed, score.kl) == (told.missed, pytest.approx(told.kl))
    assert min(scores, key=lambda genome: scores[genome]) in second.asked


def test_a_journal_answers_what_it_knows(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    short, seen = run("evolution", file=file, rungs=2, evaluations=100)
    longer, more = run("evolution", file=file, rungs=2, evaluations=150)
    unbroken, whole = run("evolution", rungs=2, evaluations=150)
    assert longer == unbroken
    assert sorted(seen.asked + more.asked) == sorted(whole.asked)
    assert longer.score.kl <= short.score.kl


def test_a_journal_is_of_one_search(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    for _ in range(2):
        with Journal(file) as journal:
            journal.settle({"seed": 1, "operator": "random"})
    with Journal(file) as journal, pytest.raises(UsageError, match=r"of another search: seed differ.*seed 1.*seed 2"):
        journal.settle({"seed": 2, "operator": "random"})
    other = tmp_path / "other"
    other.write_text("not a database, though long enough to look like one" * 20)
    with pytest.raises(ArtifactError, match="not a journal"):
        Journal(other)
