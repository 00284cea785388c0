"""Fitness: many candidates on few tokens, survivors on more, and nothing measured twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .genome import Genome
from .journal import Journal

#: Of the candidates on one rung, one in so many goes on to the next.
SURVIVES_ONE_IN = 4

#: Genomes on one walk at most: what is lost when a search is killed, and what memory holds at once.
AT_ONCE = 16


@dataclass(frozen=True, order=True)
class Score:
    """How good a genome is; the least is the best.

    Args:
        missed: rungs that it did not come to; 0 for those that were measured on all tokens.
        kl: nats per token, over all tokens that it was measured on.
    """

    missed: int
    kl: float


@dataclass(frozen=True)
class Rung:
    """Tokens that candidates are compared on after those of the rungs before.

    Args:
        weight: how many tokens.
        measure: the mean KL per token of genomes, on these tokens alone.
    """

    weight: int
    measure: Callable[[Sequence[Genome]], Mapping[Genome, float]]


@dataclass(frozen=True)
class Fitness:
    """What genomes are worth. Everything measured goes through the journal, which is the cache.

    Args:
        rungs: of tokens, the first first.
        journal: what is known.
        measured: called with the genomes just measured.
    """

    rungs: Sequence[Rung]
    journal: Journal
    measured: Callable[[Sequence[Genome]], None] = lambda _: None

    def __call__(self, genomes: Iterable[Genome]) -> dict[Genome, Score]:
        """The score of each genome: successive halving, by quarters."""
        alive, scores = list(dict.fromkeys(genomes)), dict[Genome, Score]()
        for at in range(len(self.rungs)):
            self._measure(alive, at)
            scores |= {genome: self.score(genome, at) for genome in alive}
            alive = sorted(alive, key=lambda genome: (scores[genome], genome))[: -(-len(alive) // SURVIVES_ONE_IN)]
        return scores

    def score(self, genome: Genome, reached: int) -> Score:
        """The score of a genome that was measured up to a rung."""
        weights = [rung.weight for rung in self.rungs[: reached + 1]]
        known = [self.journal.known[genome, at] for at in range(reached + 1)]
        kl = sum(weight * cost for weight, cost in zip(weights, known, strict=True)) / sum(weights)
        return Score(len(self.rungs) - 1 - reached, kl)

    def _measure(self, genomes: Sequence[Genome], at: int) -> None:
        new = [genome for genome in genomes if (genome, at) not in self.journal.known]
        for some in _chunks(new, AT_ONCE):
            self.journal.record(at, self.rungs[at].measure(some))
            self.measured(some)


def _chunks(genomes: Sequence[Genome], size: int) -> list[Sequence[Genome]]:
    return [genomes[at : at + size] for at in range(0, len(genomes), size)]
