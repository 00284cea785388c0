"""The loop: an operator proposes, fitness answers, until the evaluations are used up or nothing more is proposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .fitness import Fitness, Score
from .genome import Genome
from .operators import Operator, Task


@dataclass(frozen=True)
class Best:
    """The best genome of a search.

    Args:
        genome: it.
        score: on all tokens that are searched on.
        evaluations: genomes that were evaluated.
    """

    genome: Genome
    score: Score
    evaluations: int


def search(operator: Operator, task: Task, fitness: Fitness, better: Callable[[Best], None] = lambda _: None) -> Best:
    """The best genome that an operator finds.

    Args:
        operator: who proposes.
        task: what, and how many genomes may be evaluated.
        fitness: what they are worth; its journal notes proposals and evaluations.
        better: told the best so far after every population.
    """
    proposals, scores = operator(task), dict[Genome, Score]()
    population = next(proposals, [])
    while population:
        new = [candidate for candidate in population if candidate.genome not in scores]
        new = new[: task.evaluations - len(scores)]
        fitness.journal.propose((candidate.decoded, candidate.origin) for candidate in new)
        found = fitness(candidate.genome for candidate in new)
        scores |= found
        better(_best(scores))
        if len(scores) == task.evaluations:  # before a language model is asked in vain
            break
        try:
            population = proposals.send(scores)
        except StopIteration:
            break
    return _best(scores)


def _best(scores: dict[Genome, Score]) -> Best:
    genome = min(scores, key=lambda each: (scores[each], each))
    return Best(genome, scores[genome], len(scores))
