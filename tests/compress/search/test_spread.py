"""Candidates measured by workers over a real Ray on this machine: the same values, also when a worker is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flabc.compress import load, pipeline
from flabc.compress.config import Calibration, WidthsConfig
from flabc.compress.search import grid, spread
from flabc.compress.search.genome import Genome
from flabc.compress.search.population import Population, population_of
from flabc.errors import StageError, UsageError

ray = pytest.importorskip("ray", reason="Ray is not installed (extra distributed)")
pytestmark = pytest.mark.usefixtures("one_thread")

#: Small enough to leave tokens out.
TOP_K = 2


@pytest.fixture(scope="module")
def population(tiny: Callable[[str], Path]) -> Population:
    model = load.load(str(tiny("qwen2-tied")))
    stage = WidthsConfig(of=("ffn", "heads"), multiple_of=8, score="wifv")
    calibration = Calibration(corpus="python-stdlib", sequences=4, sequence_length=32)
    context = pipeline.context_of(model, None, calibration, "cpu", 0)
    budget = int(0.8 * model.spec.num_parameters)
    return population_of(model, model, grid.space_of(model, stage, budget, 4, sub_blocks=False), stage, context)


@pytest.fixture(scope="module")
def portions(population: Population) -> list[torch.Tensor]:
    tokens = population.context.tokens(population.model)
    return [tokens[:1], tokens[1:]]


@pytest.fixture(scope="module")
def genomes(population: Population) -> list[Genome]:
    tops = population.space.tops
    return [
        population.space.decode([max(0, top - (at + n) % 3) for at, top in enumerate(tops)]).genome for n in range(3)
    ]


@pytest.fixture(scope="module")
def alone(population: Population, portions: list[torch.Tensor], genomes: list[Genome]) -> list[dict[Genome, float]]:
    return [population.on(tokens, TOP_K).kl(genomes) for tokens in portions]


@pytest.fixture(autouse=True)
def _one_processor_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread.os, "cpu_count", lambda: 2)


def test_workers_measure_what_one_process_measures_even_if_one_is_killed(
    population: Population,
    portions: list[torch.Tensor],
    genomes: list[Genome],
    alone: list[dict[Genome, float]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    killed = tmp_path / "killed"

    class Dies(spread.Worker):
        """The first of the workers to be asked for the second rung is killed while it measures."""

        def kl(self, at: int, genomes: object) -> dict[Genome, float]:
            found = super().kl(at, genomes)  # type: ignore[arg-type]
            if at == 1:
                try:
                    killed.mkdir()
                except FileExistsError:
                    return found
                os.kill(os.getpid(), signal.SIGKILL)
            return found

    monkeypatch.setattr(spread, "Worker", Dies)
    with spread.rungs(population, portions, spread.Workers(2), TOP_K) as rungs:
        assert [rung.weight for rung in rungs] == [population.on(tokens).weight for tokens in portions]
        assert [dict(rung.measure(genomes)) for rung in rungs] == alone
        assert killed.exists()


def test_a_worker_that_dies_again_and_again_ends_the_search(genomes: list[Genome]) -> None:
    """Over a stand-in for Ray that gave up on the actor."""

    class Ray:
        exceptions = ray.exceptions

        @staticmethod
        def get(_: object) -> None:
            raise ray.exceptions.RayActorError

    worker = SimpleNamespace(kl=SimpleNamespace(remote=lambda at, some: None))
    with pytest.raises(StageError, match=r"died 4 times.*--resume"):
        spread._measure(Ray, [worker], 0, genomes)


def test_a_cluster_that_is_not_there_is_told(population: Population, portions: list[torch.Tensor]) -> None:
    with (
        pytest.raises(UsageError, match=r"no Ray at 'auto'.*ray start --head"),
        spread.rungs(population, portions, spread.Workers(1, "auto")),
    ):
        pass


def test_more_workers_than_there_is_room_for_are_refused(population: Population, portions: list[torch.Tensor]) -> None:
    with (
        pytest.raises(UsageError, match=r"no room for so many workers. Expected: 64 CPUs.*--workers"),
        spread.rungs(population, portions, spread.Workers(64)),
    ):
        pass
