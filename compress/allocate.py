"""Allocation: how many channels and heads each layer loses, given what each of them is worth.

To add an allocation, write a function and list it in ``ALLOCATIONS``. It says how many units each pool keeps; a pool
loses them from the least worth upwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Pool:
    """What may go of one kind in one layer.

    Args:
        layer: the layer.
        units: how many there are: FFN channels, or KV groups with their query heads.
        price: of one unit: parameters, or nanoseconds.
        step: the number that is left is a multiple of this.
        least: units that stay at any rate.
        worth: of each unit, (units,), for allocations that rank units across pools.
    """

    layer: int
    units: int
    price: int
    step: int = 1
    least: int = 1
    worth: Tensor | None = None

    def aligned(self, units: float) -> int:
        """The largest number not above ``units`` that may be left: at least what was asked for goes."""
        floor = int(units / self.step + 1e-9) * self.step
        return min(self.units, max(self.least, floor))


Pools = Sequence[Pool]


def uniform(pools: Pools, amount: float, _: float) -> list[int]:
    """The same share of every pool."""
    share = amount / sum(pool.price * pool.units for pool in pools)
    return [pool.aligned(pool.units * (1 - share)) for pool in pools]


def ramp(pools: Pools, amount: float, slope: float) -> list[int]:
    """Rates in arithmetic progression over the layers, each deeper one more by ``slope``. ATP (Huang et al., 2025)."""
    total = sum(pool.price * pool.units for pool in pools)
    centre = sum(pool.layer * pool.price * pool.units for pool in pools) / total
    rates = [amount / total + slope * (pool.layer - centre) for pool in pools]
    return [pool.aligned(pool.units * (1 - min(1.0, max(0.0, rate)))) for pool, rate in zip(pools, rates, strict=True)]


def standardised(pools: Pools, amount: float, _: float) -> list[int]:
    """One threshold across layers and kinds for worth standardised within each pool. FLAP (An et al., 2023)."""
    return _cheapest([_standardised(_ranked(pool)) for pool in pools], pools, amount)


def marginal(pools: Pools, amount: float, _: float) -> list[int]:
    """One threshold across layers and kinds for worth by price; for scores that are costs of the whole model."""
    return _cheapest([_ranked(pool) / pool.price for pool in pools], pools, amount)


@dataclass(frozen=True)
class Allocation:
    """How to allot.

    Args:
        allot: from pools, what has to go, in the unit of their prices, and the recipe's ``slope`` to the units that
            each pool keeps.
        ranks: whether it needs to know what each unit is worth.
        measured: whether that is measured on the whole model, as KL (see ``sensitivity``), instead of by the score.
    """

    allot: Callable[[Pools, float, float], list[int]]
    ranks: bool
    measured: bool = False


#: By their names in recipes.
ALLOCATIONS = {
    "global": Allocation(standardised, ranks=True),
    "kl": Allocation(marginal, ranks=True, measured=True),
    "marginal": Allocation(marginal, ranks=True),
    "ramp": Allocation(ramp, ranks=False),
    "uniform": Allocation(uniform, ranks=False),
}


def _ranked(pool: Pool) -> Tensor:
    assert pool.worth is not None, "this allocation ranks units"
    return pool.worth.double()


def _standardised(worth: Tensor) -> Tensor:
    return (worth - worth.mean()) / worth.std().clamp(min=1e-300)


def _cheapest(worth: Sequence[Tensor], pools: Pools, amount: float) -> list[int]:
    """Remove steps of units, the least worth first whatever their pool, until so much is gone."""
    steps = sorted((price, at, units) for at, pool in enumerate(pools) for price, units in _steps(worth[at], pool))
    left = [pool.units for pool in pools]
    for _, at, units in steps:
        if amount <= 0:
            break
        left[at] -= units
        amount -= units * pools[at].price
    return left


def _steps(worth: Tensor, pool: Pool) -> Iterator[tuple[float, int]]:
    """A pool's units in the steps in which they go, the least worth first: mean worth and number of each step."""
    ranked = worth.sort().values
    begin, first = 0, pool.units % pool.step or pool.step
    for end in range(first, pool.units - pool.least + 1, pool.step):
        yield float(ranked[begin:end].mean()), end - begin
        begin = end
