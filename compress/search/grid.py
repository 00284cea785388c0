"""The grid on which a model's widths are searched: the levels of each place, and what each costs in parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from flabc.families import Part
from flabc.spec import LayerSpec, ModelSpec

from ..allocate import Pool
from ..config import WidthsConfig
from ..model import CausalLM
from ..stage import Context
from ..units import KINDS, Place, places, unit_parameters
from ..widths import to_remove, widths
from .genome import Genome, Site, Space
from .latencies import unit_price

#: The part of a layer that each kind of unit belongs to.
PARTS = {"ffn": Part.FFN, "heads": Part.ATTENTION}


def space_of(model: CausalLM, config: WidthsConfig, budget: int, levels: int, *, sub_blocks: bool) -> Space:
    """What can be searched of a model.

    Args:
        model: the model as the widths stage finds it.
        config: the stage.
        budget: parameters that the whole model may have afterwards.
        levels: at most so many for each place, not counting its absence.
        sub_blocks: whether a sub-block may go altogether.

    Raises:
        StageError: if the budget leaves nothing to choose.
    """
    sites = sites_of(model, config, levels, sub_blocks=sub_blocks)
    rest = model.spec.num_parameters - sum(site.parameters[-1] for site in sites)
    return Space(genome_of(model.spec), sites, budget - rest)


def sites_of(model: CausalLM, config: WidthsConfig, levels: int, *, sub_blocks: bool) -> tuple[Site, ...]:
    """The places of a model that a widths stage narrows, with their levels; see ``space_of``."""
    return tuple(_site(model, place, config, levels, sub_blocks) for place in places(model, config.of))


def genome_of(spec: ModelSpec) -> Genome:
    """The genome of a model as it is."""
    return Genome(
        tuple(layer.intermediate_size for layer in spec.layers),
        tuple(layer.num_key_value_heads for layer in spec.layers),
    )


def rates_of(whole: Genome, genome: Genome, kinds: Sequence[str]) -> dict[str, list[float]]:
    """The share of its units that each layer loses, by kind: what the widths stage takes as ``rates``."""
    return {
        kind: [
            1 - genome.units((kind, layer)) / units if units else 0.0
            for layer, units in enumerate(whole.ffn if kind == "ffn" else whole.heads)
        ]
        for kind in kinds
    }


def genome_at(whole: Genome, rates: Mapping[Any, Sequence[float]]) -> Genome:
    """The genome that a widths stage's ``rates`` ask for, before alignment."""
    return whole.with_units(
        {
            (kind, layer): round(whole.units((kind, layer)) * (1 - rate))
            for kind, shares in rates.items()
            for layer, rate in enumerate(shares)
        }
    )


def parameters_to_remove(model: CausalLM, config: WidthsConfig, context: Context) -> int:
    """What the widths stage would take away: by its rate, for the target, or by its rates if there is no target.

    Raises:
        StageError: if nothing says.
    """
    whole = genome_of(model.spec)
    prices = {place: unit_parameters(model, place) for place in places(model, config.of)}
    if config.rates is not None and context.target_parameters is None:
        left = widths(model, config, context, {})
        return sum((whole.units(place) - units) * prices[place] for place, units in left.items())
    total = sum(whole.units(place) * price for place, price in prices.items())
    return ceil(to_remove(total, config, context, model))


def pool_of(model: CausalLM, site: Site) -> Pool:
    """A site as the allocations see it; its worth is the caller's to add."""
    sizes = [size for size in site.sizes if size]
    step = sizes[1] - sizes[0] if len(sizes) > 1 else sizes[0]
    price = unit_price(site) if site.nanoseconds else unit_parameters(model, site.place)
    return Pool(site.place[1], site.sizes[-1], price, step, sizes[0])


def _site(model: CausalLM, place: Place, config: WidthsConfig, levels: int, sub_blocks: bool) -> Site:
    kind, layer = place
    shape = model.spec.layers[layer]
    units = KINDS[kind].units(shape)
    sizes = (*([0] if sub_blocks else []), *_sizes(units, config.multiple_of if kind == "ffn" else 1, levels))
    return Site(place, sizes, tuple(_parameters(model.spec, shape, kind, size) for size in sizes))


def _sizes(units: int, multiple: int, levels: int) -> list[int]:
    """Multiples of a multiple of ``multiple``, and all units: as fine as the number of levels lets it be."""
    coarse = max(1, -(-units // (multiple * levels)))
    return [*range(coarse * multiple, units, coarse * multiple), units]


def _parameters(spec: ModelSpec, shape: LayerSpec, kind: str, size: int) -> int:
    """Parameters of a layer's sub-block with so many units."""
    changed = {KINDS[kind].field: size}
    if kind == "heads":
        changed["num_attention_heads"] = size * (shape.num_attention_heads // shape.num_key_value_heads)
    layer = LayerSpec(**{**shape.model_dump(), **changed})
    return spec.model_copy(update={"layers": (layer,)}).parameters()[PARTS[kind]]
