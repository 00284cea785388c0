"""How long blocks of each width take on a target: the table that a budget of time is counted by.

Who serves on a machine measures it there; here it is only read. Between measured widths time is taken to be linear,
and never to fall with width: what a noisy measurement says otherwise counts as no gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from flabc.errors import UsageError
from flabc.frozen import Frozen, read_yaml, validated

from .genome import Genome, Site, Space

#: What a budget of time is counted in.
PER_MS = 1_000_000


class Latencies(Frozen):
    """Milliseconds of one step, by what is computed in it.

    Args:
        measured: what was measured, for people: engine, machine, batch.
        ffn: of one layer's FFN, by its channels.
        heads: of one layer's attention, by its KV groups.
        rest: of everything else: embedding, output matrix, what a step takes with no layer in it; and of the kind of
            which the table has nothing.
    """

    measured: str = ""
    ffn: dict[NonNegativeInt, NonNegativeFloat] = Field(default_factory=dict)
    heads: dict[NonNegativeInt, NonNegativeFloat] = Field(default_factory=dict)
    rest: NonNegativeFloat = 0.0

    @classmethod
    def read(cls, file: Path) -> Latencies:
        """The table of a YAML or JSON file: ``ffn: {0: 0, 4864: 1.2}``, ``heads: {2: 0.3}``, ``rest: 5.1``.

        Raises:
            RecipeError: if it is none; every field that is wrong is named.
        """
        return validated(cls, read_yaml(file), f"The table of latencies {file}")

    def nanoseconds(self, kind: str, sizes: Sequence[int]) -> tuple[int, ...]:
        """What one layer's block takes at each of several sizes, ascending.

        Raises:
            UsageError: if the table does not reach as far.
        """
        known = {0: 0.0, **self._of(kind)}
        widths = sorted(known)
        if sizes[-1] > widths[-1]:
            raise UsageError(
                f"The table of latencies ends before the model's {kind}.",
                expected=f"up to {sizes[-1]} units",
                found=f"up to {widths[-1]}",
                fix="Measure the widths that the model has, on the target: perf/block_latencies.py.",
            )
        never_less = np.maximum.accumulate([known[width] for width in widths])
        return tuple(int(each) for each in np.rint(np.interp(sizes, widths, never_less) * PER_MS))

    def step_ms(self, genome: Genome) -> float:
        """What a step of a genome takes, in milliseconds."""
        layers = [(kind, sizes) for kind, sizes in (("ffn", genome.ffn), ("heads", genome.heads)) if self._of(kind)]
        return self.rest + sum(self.nanoseconds(kind, [size])[0] for kind, sizes in layers for size in sizes) / PER_MS

    def _of(self, kind: str) -> dict[int, float]:
        return self.ffn if kind == "ffn" else self.heads


def timed(whole: Genome, dense: Genome, sites: Sequence[Site], latencies: Latencies, share: float) -> Space:
    """What can be searched with a budget of time.

    Args:
        whole: the model that is narrowed.
        dense: the model before any cut, whose step is the measure.
        sites: the places that are searched.
        latencies: the table.
        share: of the dense model's step, how much may be left.

    Raises:
        UsageError: if the table does not reach as far as the sites.
        StageError: if the budget leaves nothing to choose.
    """
    on_time = [replace(site, nanoseconds=latencies.nanoseconds(site.place[0], site.sizes)) for site in sites]
    fixed = round(latencies.step_ms(whole) * PER_MS) - sum(site.costs[-1] for site in on_time)
    return Space(whole, tuple(on_time), int(share * latencies.step_ms(dense) * PER_MS) - fixed)


def unit_price(site: Site) -> int:
    """What one unit of a site takes, on the average, in nanoseconds; at least one."""
    return max(1, (site.nanoseconds[-1] - site.nanoseconds[0]) // max(1, site.sizes[-1] - site.sizes[0]))
