"""Operators: who proposes the next candidates. To add one, write a generator and list it in ``registry.OPERATORS``.

An operator yields populations and is sent the scores of those that were evaluated, which may be fewer: the evaluations
end when they are used up. It may depend on its task and on these scores alone, so that a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..allocate import ALLOCATIONS, Pool
from .fitness import Score
from .genome import Decoded, Genome, Space

if TYPE_CHECKING:
    from .llm import Dialogue

#: Mutations tried for a new genome before an operator takes it that there are none left.
PATIENCE = 200

#: Level switches of one mutation at most.
SWITCHES = 3

#: Multiples of it spread evenly over the unit interval, however many there are.
_GOLDEN = (5**0.5 - 1) / 2

#: Slopes that ``ramp`` tries at most.
SLOPES = 32


@dataclass(frozen=True)
class Task:
    """What an operator is given.

    Args:
        space: what can be proposed.
        pools: the sites as the allocations see them, with the worth of each unit.
        seed: the only source of chance.
        evaluations: genomes that will be evaluated at most.
        offspring: genomes of one generation.
        start: where ``evolution`` begins, instead of the uniform genome.
        dialogue: with a language model, for ``llm``.
    """

    space: Space
    pools: Sequence[Pool]
    seed: int
    evaluations: int
    offspring: int
    start: Genome | None = None
    dialogue: Dialogue | None = None

    @property
    def turns(self) -> list[int]:
        """The sites in an order that goes all over the depth: what the grid leaves over makes no ramp."""
        return sorted(range(len(self.space.sites)), key=lambda at: at * _GOLDEN % 1)

    def beginning_at(self, start: Genome | None) -> Task:
        """The same with another beginning."""
        return replace(self, start=start)

    def allotted(self, allocation: str, slope: float = 0.0) -> Decoded:
        """The genome nearest to what an allocation of the widths stage gives."""
        gone = self.space.most - self.space.budget
        left = ALLOCATIONS[allocation].allot(self.pools, gone, slope)
        levels = [site.level(units) for site, units in zip(self.space.sites, left, strict=True)]
        return self.space.decode(levels, self.turns)


@dataclass(frozen=True)
class Candidate:
    """A genome that is proposed, how it was repaired, and where it comes from."""

    decoded: Decoded
    origin: str

    @property
    def genome(self) -> Genome:
        """The genome."""
        return self.decoded.genome


Scores = Mapping[Genome, Score]
Proposals = Generator[Sequence[Candidate], Scores, None]


class Operator(Protocol):
    """Who proposes."""

    def __call__(self, task: Task) -> Proposals:
        """Yield populations, be sent their scores, return when there is nothing more to propose."""
        ...


def uniform(task: Task) -> Proposals:
    """The same rate everywhere: one evaluation."""
    yield [Candidate(task.allotted("uniform"), "uniform")]


def global_(task: Task) -> Proposals:
    """One threshold of standardised worth across all layers: one evaluation. FLAP (An et al., 2023)."""
    yield [Candidate(task.allotted("global"), "global")]


def ramp(task: Task) -> Proposals:
    """Rates that rise or fall evenly with depth, the slope found by trying. ATP (Huang et al., 2025)."""
    count = min(task.evaluations, SLOPES)
    steepest = _steepest(task)
    slopes = np.linspace(-steepest, steepest, count) if count > 1 else [0.0]
    yield [Candidate(task.allotted("ramp", float(slope)), f"slope {slope:+.4f}") for slope in slopes]


def random(task: Task) -> Proposals:
    """Levels drawn at random, each place by itself, and repaired in a random order."""
    rng, space, seen = np.random.default_rng(task.seed), task.space, set[Genome]()

    def draw() -> Candidate:
        levels = [int(rng.integers(0, top + 1)) for top in space.tops]
        return Candidate(space.decode(levels, rng.permutation(len(levels)).tolist()), "random")

    while drawn := _new(draw, task.offspring, seen):
        yield drawn


def evolution(task: Task) -> Proposals:
    """EvoPress (Sieberling et al., 2024): offspring of one parent by level switches; the best takes its place.

    A switch raises one place by a level and lowers another; one mutation is the smaller of two draws from one to three
    switches, so that most are small. The parent stays until an offspring that came to the last rung is better.
    """
    rng, space, seen = np.random.default_rng(task.seed), task.space, set[Genome]()
    if task.start is None:
        first = Candidate(task.allotted("uniform"), "uniform")
    else:
        first = Candidate(space.decode(space.levels(task.start)), "start")
    seen.add(first.genome)
    parent, best = first, (yield [first])[first.genome]

    def mutate() -> Candidate:
        return Candidate(mutated(space, parent.genome, rng), "mutation")

    while offspring := _new(mutate, task.offspring, seen):
        scores = yield offspring
        for candidate in offspring:
            if scores.get(candidate.genome, _WORST) < best:
                parent, best = candidate, scores[candidate.genome]


def mutated(space: Space, genome: Genome, rng: np.random.Generator) -> Decoded:
    """A genome after a few level switches, repaired where two steps are not of one size."""
    levels = space.levels(genome)
    for _ in range(min(rng.integers(1, SWITCHES + 1, size=2))):
        down = [at for at, level in enumerate(levels) if level > 0]
        up = [at for at, level in enumerate(levels) if level < space.tops[at]]
        lower, higher = int(rng.choice(down)), int(rng.choice(up))
        levels[lower] -= 1
        levels[higher] += 1
    return space.decode(levels, rng.permutation(len(levels)).tolist())


#: The score of what was not evaluated.
_WORST = Score(2**31, float("inf"))


def _new(draw: Callable[[], Candidate], count: int, seen: set[Genome]) -> list[Candidate]:
    """So many genomes that were not seen, fewer if none turn up any more; they are seen from now on."""
    found = list[Candidate]()
    for _ in range(PATIENCE * count):
        candidate = draw()
        if candidate.genome not in seen:
            seen.add(candidate.genome)
            found.append(candidate)
        if len(found) == count:
            break
    return found


def _steepest(task: Task) -> float:
    """The slope at which the first layer loses nothing, or the last one everything."""
    total = sum(pool.price * pool.units for pool in task.pools)
    rate = 1 - task.space.budget / task.space.most
    centre = sum(pool.layer * pool.price * pool.units for pool in task.pools) / total
    reach = max(abs(pool.layer - centre) for pool in task.pools)
    return min(rate, 1 - rate) / reach if reach else 0.0
