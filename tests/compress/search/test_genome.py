"""Genomes: whatever is wanted, what comes out is on the grid and on the budget; and the widths stage takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc.compress import load, widths
from flabc.compress.config import WidthsConfig
from flabc.compress.search.genome import Decoded, Genome, Site, Space
from flabc.compress.search.grid import rates_of, space_of
from flabc.compress.stage import Context
from flabc.errors import StageError

MakeContext = Callable[..., Context]


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """Uneven sites of both kinds, some of which can go altogether, and a budget between the ends."""
    layers = draw(st.integers(1, 5))
    sites = []
    for kind, price in (("ffn", draw(st.integers(1, 9))), ("heads", draw(st.integers(1, 40)))):
        for layer in range(layers):
            step, count = draw(st.integers(1, 8)), draw(st.integers(1, 6))
            sizes = tuple(step * at for at in range(draw(st.integers(0, 1)), count + 1 + 1))
            fixed = draw(st.integers(0, 5))  # a norm, which goes with the sub-block
            sites.append(Site((kind, layer), sizes, tuple(size * price + fixed * (size > 0) for size in sizes)))
    whole = Genome(
        tuple(site.sizes[-1] for site in sites if site.place[0] == "ffn"),
        tuple(site.sizes[-1] for site in sites if site.place[0] == "heads"),
    )
    least = sum(site.parameters[0] for site in sites)
    rise = min(site.parameters[1] - site.parameters[0] for site in sites)
    most = sum(site.parameters[-1] for site in sites)
    return Space(whole, tuple(sites), draw(st.integers(least + rise, most - 1)))


@settings(max_examples=200)
@given(space=spaces(), data=st.data())
def test_decoding_lands_on_the_budget_to_within_a_step(space: Space, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.integers(-2, 9), min_size=len(space.sites), max_size=len(space.sites)))
    order = data.draw(st.permutations(range(len(space.sites))))
    decoded = space.decode(wanted, order)
    levels = space.levels(decoded.genome)
    assert space.genome(levels) == decoded.genome  # on the grid
    spare = space.budget - sum(
        site.parameters[site.sizes.index(decoded.genome.units(site.place))] for site in space.sites
    )
    assert spare >= 0
    steps = [
        site.parameters[level + 1] - site.parameters[level]
        for site, level in zip(space.sites, levels, strict=True)
        if level + 1 < len(site.sizes)
    ]
    assert spare < min(steps)  # there are steps left: the budget is below the whole model
    moved = dict(decoded.repair)
    for site, want, level in zip(space.sites, wanted, levels, strict=True):
        assert min(max(want, 0), len(site.sizes) - 1) + moved.get(site.place, 0) == level
    assert space.decode(levels, order) == Decoded(decoded.genome)  # again: nothing to repair
    assert space.decode(levels, order[::-1]) == Decoded(decoded.genome)


@given(
    ffn=st.lists(st.integers(0, 999), min_size=1, max_size=9), heads=st.lists(st.integers(0, 9), min_size=1, max_size=9)
)
def test_a_key_is_the_genome(ffn: list[int], heads: list[int]) -> None:
    genome = Genome(tuple(ffn), tuple(heads))
    assert Genome.parse(genome.key) == genome
    assert len({genome, Genome.parse(genome.key)}) == 1
    more = Genome((ffn[0] + 1, *ffn[1:]), tuple(heads))
    assert more.key != genome.key
    assert sorted([more, genome]) == [genome, more]


def test_a_repair_says_what_it_moved() -> None:
    sites = tuple(Site(("ffn", layer), (8, 16, 24), (8, 16, 24)) for layer in range(2))
    space = Space(Genome((24, 24), (1, 1)), sites, 33)
    assert space.decode([2, 2]) == Decoded(Genome((16, 16), (1, 1)), ((("ffn", 0), -1), (("ffn", 1), -1)))
    assert space.decode([2, 2]).repaired == "ffn.0-1 ffn.1-1"
    assert space.decode([0, 2], [1, 0]).repaired == ""


@pytest.mark.parametrize("budget", [15, 48])
def test_a_budget_out_of_reach_is_refused(budget: int) -> None:
    sites = tuple(Site(("ffn", layer), (8, 16, 24), (8, 16, 24)) for layer in range(2))
    with pytest.raises(StageError, match="from 24 to 47 parameters"):
        Space(Genome((24, 24), (1, 1)), sites, budget)


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-untied-biased", "gemma2-tied", "phi3-untied"])
@pytest.mark.parametrize("sub_blocks", [False, True])
def test_parameters_are_those_of_models_that_were_cut(
    tiny: Callable[[str], Path], make_context: MakeContext, name: str, sub_blocks: bool
) -> None:
    model = load.load(str(tiny(name)))
    context = make_context(model)
    of = WidthsConfig.model_validate({"of": ("ffn", "heads"), "multiple_of": 32, "score": "magnitude"})
    most = round(0.85 * model.spec.num_parameters)
    space = space_of(model, of, most, 8, sub_blocks=sub_blocks)
    assert {site.sizes[0] == 0 for site in space.sites} == {sub_blocks}
    wanted = [[0, 2, 0, 1, 0, 1], [3, 0, 1, 1, 1, 0]]
    for decoded in map(space.decode, wanted):
        rates = rates_of(space.whole, decoded.genome, of.of)
        config = of.model_copy(update={"rates": rates, "restore": False})
        cut = widths.apply(model, widths.plan(model, config, context))
        steps = [site.parameters[1] - site.parameters[0] for site in space.sites]
        assert 0 <= most - cut.spec.num_parameters < max(steps)
        left = [(layer.intermediate_size, layer.num_key_value_heads) for layer in cut.spec.layers]
        asked = list(zip(decoded.genome.ffn, decoded.genome.heads, strict=True))
        assert left == [layer for layer in asked if layer != (0, 0)]
