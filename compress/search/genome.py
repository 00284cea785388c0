"""The genome: how many units of each kind each layer keeps, on a grid, and always on the budget.

A candidate is wanted as levels, one per place; decoding repairs it until no place can be raised by a step without going
over the budget. What the repair changed is part of what comes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from flabc.errors import StageError

#: A kind of unit, ``ffn`` or ``heads``, and a layer that has it.
Place = tuple[str, int]


@dataclass(frozen=True, order=True)
class Genome:
    """What each layer keeps; 0 means that the sub-block is gone.

    Args:
        ffn: FFN channels of each layer.
        heads: KV groups of each layer.
    """

    ffn: tuple[int, ...]
    heads: tuple[int, ...]

    @property
    def key(self) -> str:
        """The genome as text, one spelling for each: ``ffn 64,32 heads 2,1``."""
        return f"ffn {','.join(map(str, self.ffn))} heads {','.join(map(str, self.heads))}"

    @classmethod
    def parse(cls, key: str) -> Genome:
        """The genome of a key."""
        _, ffn, _, heads = key.split()
        return cls(tuple(map(int, ffn.split(","))), tuple(map(int, heads.split(","))))

    def units(self, place: Place) -> int:
        """How many units a place keeps."""
        kind, layer = place
        return (self.ffn if kind == "ffn" else self.heads)[layer]

    def with_units(self, units: Mapping[Place, int]) -> Genome:
        """The genome with other numbers for some places."""
        ffn, heads = list(self.ffn), list(self.heads)
        for (kind, layer), number in units.items():
            (ffn if kind == "ffn" else heads)[layer] = number
        return Genome(tuple(ffn), tuple(heads))


@dataclass(frozen=True)
class Site:
    """A place that is searched, and the levels on which it can be.

    Args:
        place: the kind and the layer.
        sizes: units that stay at each level, ascending; the last is the place as it is.
        parameters: of the sub-block at each level, ascending.
        nanoseconds: that it takes at each level, never fewer than below, if time is what there is a budget of.
    """

    place: Place
    sizes: tuple[int, ...]
    parameters: tuple[int, ...]
    nanoseconds: tuple[int, ...] = ()

    @property
    def costs(self) -> tuple[int, ...]:
        """What each level takes of the budget."""
        return self.nanoseconds or self.parameters

    def level(self, units: float) -> int:
        """The highest level that does not keep more units than this; the lowest if all do."""
        return max((at for at, size in enumerate(self.sizes) if size <= units + 1e-9), default=0)


@dataclass(frozen=True)
class Decoded:
    """A genome on the budget, and the levels by which the repair moved places to get it there."""

    genome: Genome
    repair: tuple[tuple[Place, int], ...] = ()

    @property
    def repaired(self) -> str:
        """The repair as text: ``ffn.3-1 heads.0+1``; empty if there was none."""
        return " ".join(f"{kind}.{layer}{moved:+d}" for (kind, layer), moved in self.repair)


@dataclass(frozen=True)
class Space:
    """All genomes of a model that are on a budget.

    Args:
        whole: the model as it is.
        sites: the places that are searched.
        budget: what all sites may cost together: parameters, or nanoseconds.

    Raises:
        StageError: if the budget leaves nothing to choose.
    """

    whole: Genome
    sites: tuple[Site, ...]
    budget: int

    def __post_init__(self) -> None:
        least = sum(site.costs[0] for site in self.sites)
        rises = [site.costs[1] - site.costs[0] for site in self.sites if len(site.sizes) > 1]
        rise = min(rises, default=0)
        if not rises or not least + rise <= self.budget < self.most:
            raise StageError(
                "There is nothing to search: the target is outside what narrowing can reach.",
                expected=f"from {least + rise:,} to {self.most - 1:,} {self.unit} in what is narrowed",
                found=f"{self.budget:,}",
                fix="Change the target, narrow more kinds ('of'), or let other stages cut less.",
            )

    @cached_property
    def _at(self) -> dict[Place, int]:
        return {site.place: at for at, site in enumerate(self.sites)}

    @property
    def tops(self) -> list[int]:
        """The highest level of each site."""
        return [len(site.sizes) - 1 for site in self.sites]

    @property
    def unit(self) -> str:
        """What the budget is counted in."""
        return "nanoseconds" if any(site.nanoseconds for site in self.sites) else "parameters"

    @property
    def most(self) -> int:
        """What all sites cost as they are."""
        return sum(site.costs[-1] for site in self.sites)

    def parameters(self, levels: Sequence[int]) -> int:
        """Parameters of all sites together."""
        return sum(site.parameters[level] for site, level in zip(self.sites, levels, strict=True))

    def cost(self, levels: Sequence[int]) -> int:
        """What all sites together take of the budget."""
        return sum(site.costs[level] for site, level in zip(self.sites, levels, strict=True))

    def genome(self, levels: Sequence[int]) -> Genome:
        """The genome with the sites on these levels, on the budget or not."""
        units = {site.place: site.sizes[level] for site, level in zip(self.sites, levels, strict=True)}
        return self.whole.with_units(units)

    def levels(self, genome: Genome) -> list[int]:
        """The level of each site, of a genome that need not be on the grid: the nearest below."""
        return [site.level(genome.units(site.place)) for site in self.sites]

    def decode(self, wanted: Sequence[int], order: Sequence[int] | None = None) -> Decoded:
        """The genome on the budget that is got from wanted levels, one step of one site at a time.

        Sites are lowered in turn until the budget holds, then raised in turn until no step of any site fits.
        A genome that is there already stays as it is.

        Args:
            wanted: a level per site; those off the grid count as its ends.
            order: whose turn it is, the first first; by default the sites in their order.
        """
        turns = range(len(self.sites)) if order is None else order
        begin = [min(max(0, level), top) for level, top in zip(wanted, self.tops, strict=True)]
        levels = list(begin)
        spare = self.budget - self.cost(levels)
        for at in self._downwards(levels, turns):
            if spare >= 0:
                break
            levels[at] -= 1
            spare += self._step(at, levels[at])
        while raised := [at for at in turns if self._rises(at, levels, spare)]:
            for at in raised:
                if self._rises(at, levels, spare):
                    spare -= self._step(at, levels[at])
                    levels[at] += 1
        moved = (after - before for before, after in zip(begin, levels, strict=True))
        repair = tuple((site.place, by) for site, by in zip(self.sites, moved, strict=True) if by)
        return Decoded(self.genome(levels), repair)

    def _downwards(self, levels: Sequence[int], turns: Sequence[int]) -> Iterator[int]:
        """Sites that can be lowered, in turn; ``levels`` changes meanwhile."""
        while any(levels):
            for at in turns:
                if levels[at]:
                    yield at

    def _step(self, at: int, level: int) -> int:
        """What it costs to go from a level to the next."""
        costs = self.sites[at].costs
        return costs[level + 1] - costs[level]

    def _rises(self, at: int, levels: Sequence[int], spare: int) -> bool:
        return levels[at] + 1 < len(self.sites[at].sizes) and self._step(at, levels[at]) <= spare
