"""Candidates measured by several workers, on this machine's processors, its GPUs, or many machines, over Ray.

Each worker holds the whole population's levels and the tokens, and measures its share of what is asked: genomes that
are neighbours in order stay together, since they have most layers in common. A worker that dies is started anew and
asked again (docs.ray.io, "Actor fault tolerance"), so that nothing is lost. What a genome is worth does not depend on
who measures it, but for the last digits where workers compute with other numbers of threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from flabc.cluster import LOCAL, joined
from flabc.errors import StageError, UsageError

from .fitness import Rung
from .genome import Genome
from .population import Population

#: How often a worker is started anew, and its share asked for again, before the search gives up.
RESTARTS = 3


@dataclass(frozen=True)
class Workers:
    """Who measures.

    Args:
        count: workers; each gets its share of as many processors as this machine has, and a GPU if one is computed on.
        address: see ``cluster.joined``; weights that were left on disk must lie at the same path on every node.
    """

    count: int = 2
    address: str = LOCAL


@contextmanager
def rungs(
    population: Population, portions: Sequence[Tensor], workers: Workers, top_k: int | None = None
) -> Iterator[list[Rung]]:
    """The rungs of a search, measured by workers.

    Args:
        population: what is measured.
        portions: the tokens of each rung, (N, T).
        workers: by whom.
        top_k: see ``population.Measured``.

    Raises:
        MissingExtraError: if Ray is not installed.
        UsageError: if there is no such cluster, or no room for so many workers in it.
    """
    # Its text is not needed to measure, and would be sent to everybody.
    bare = replace(population, context=replace(population.context, documents=(), heldout=()))
    threads = max(1, (os.cpu_count() or 1) // workers.count)
    with joined(workers.address) as ray:
        on_gpu = population.context.device.type == "cuda"
        _check_room(ray.cluster_resources(), {"CPU": workers.count * threads, "GPU": workers.count * on_gpu})
        kind = ray.remote(
            num_cpus=threads,
            num_gpus=int(on_gpu),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )(Worker)
        sent = ray.put((bare, tuple(portions), top_k))
        team = [kind.remote(sent, threads) for _ in range(workers.count)]
        weights = [tokens[:, 1:].numel() for tokens in portions]
        yield [Rung(weight, partial(_measure, ray, team, at)) for at, weight in enumerate(weights)]


def _check_room(there: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    """Ray lets a worker that no machine has room for wait, and says nothing.

    Raises:
        UsageError: if there is less of anything than is wanted.
    """
    short = [name for name, amount in wanted.items() if there.get(name, 0) < amount]
    if short:
        raise UsageError(
            "Ray has no room for so many workers.",
            expected=", ".join(f"{wanted[name]:g} {name}s" for name in short),
            found=", ".join(f"{there.get(name, 0):g}" for name in short),
            fix="Give fewer --workers.",
        )


class Worker:
    """One of them, in its process.

    Args:
        sent: the population, the tokens of each rung, and ``top_k``.
        threads: to compute with.
    """

    def __init__(self, sent: tuple[Population, Sequence[Tensor], int | None], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        population, portions, top_k = sent
        self._measured = [population.on(tokens, top_k) for tokens in portions]

    def kl(self, at: int, genomes: Sequence[Genome]) -> dict[Genome, float]:
        """The mean KL per token of genomes, on the tokens of a rung."""
        return self._measured[at].kl(genomes)


def _measure(ray: Any, team: Sequence[Any], at: int, genomes: Sequence[Genome]) -> Mapping[Genome, float]:
    """All genomes, shared out.

    Raises:
        StageError: if a worker dies again and again.
    """
    share = -(-len(genomes) // len(team))
    ordered = sorted(genomes)
    shares = [ordered[begin : begin + share] for begin in range(0, len(ordered), share)]
    asked = [worker.kl.remote(at, some) for worker, some in zip(team, shares, strict=False)]
    try:
        found: list[dict[Genome, float]] = ray.get(asked)
    except ray.exceptions.RayActorError as error:
        raise StageError(
            f"A worker of the search died {RESTARTS + 1} times: {error}",
            fix="What was measured is in the journal: see to the machine, and go on with --resume.",
        ) from error
    return {genome: cost for each in found for genome, cost in each.items()}
