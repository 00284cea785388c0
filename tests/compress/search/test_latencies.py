"""A budget of time: what a table of latencies makes of the levels that are searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import make_interp_spline

from flabc.compress.search.genome import Genome, Site
from flabc.compress.search.latencies import PER_MS, Latencies, timed, unit_price
from flabc.errors import RecipeError, StageError, UsageError

SITES = tuple(Site(("ffn", layer), (0, 64, 128, 192, 256), (0, 640, 1280, 1920, 2560)) for layer in range(3))
WHOLE = Genome((256,) * 3, (2,) * 3)
TABLE = Latencies(ffn={0: 0.0, 128: 1.0, 256: 4.0}, heads={1: 0.25, 2: 0.5}, rest=3.0)


def test_between_measured_widths_time_is_linear() -> None:
    line = make_interp_spline([0, 128, 256], [0.0, 1.0, 4.0], k=1)
    sizes = (32, 100, 128, 200, 256)
    assert TABLE.nanoseconds("ffn", sizes) == tuple(round(float(line(size)) * PER_MS) for size in sizes)


def test_a_step_is_what_all_blocks_and_the_rest_take() -> None:
    assert TABLE.step_ms(WHOLE) == pytest.approx(3.0 + 3 * 4.0 + 3 * 0.5)
    assert TABLE.step_ms(Genome((0, 128, 256), (0, 1, 2))) == pytest.approx(3.0 + 1.0 + 4.0 + 0.25 + 0.5)


@given(share=st.floats(0.4, 0.99), wanted=st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_every_genome_is_within_the_time_and_could_not_be_larger(share: float, wanted: list[int]) -> None:
    space = timed(WHOLE, WHOLE, SITES, TABLE, share)
    found = space.decode(wanted).genome
    most = share * TABLE.step_ms(WHOLE)
    assert TABLE.step_ms(found) <= most + 1e-6
    for site in SITES:
        level = site.level(found.units(site.place))
        if level + 1 < len(site.sizes):
            assert TABLE.step_ms(found.with_units({site.place: site.sizes[level + 1]})) > most - 1e-5


def test_what_earlier_stages_took_counts() -> None:
    """With a layer gone before, the rest may keep what it took."""
    dense = Genome((256,) * 4, (2,) * 4)
    space = timed(WHOLE, dense, SITES, TABLE, 0.7)
    assert TABLE.step_ms(space.decode([4, 4, 4]).genome) <= 0.7 * TABLE.step_ms(dense)
    assert space.budget > timed(WHOLE, WHOLE, SITES, TABLE, 0.7).budget


def test_what_a_noisy_measurement_says_of_narrower_blocks_is_no_loss() -> None:
    noisy = Latencies(ffn={64: 1.2, 128: 1.0, 192: 1.5, 256: 2.0})
    assert noisy.nanoseconds("ffn", (64, 128, 192, 256)) == (1_200_000, 1_200_000, 1_500_000, 2_000_000)
    space = timed(WHOLE, WHOLE, SITES, noisy, 0.6)
    assert noisy.step_ms(space.decode([4, 0, 0]).genome) <= 0.6 * noisy.step_ms(WHOLE) + 1e-6


def test_a_units_price_is_that_of_all_of_them_shared() -> None:
    site = timed(WHOLE, WHOLE, SITES, TABLE, 0.7).sites[0]
    assert unit_price(site) == 4 * PER_MS // 256


def test_a_table_that_ends_too_early_is_refused() -> None:
    with pytest.raises(UsageError, match=r"ends before the model's ffn.*up to 256 units.*up to 128"):
        timed(WHOLE, WHOLE, SITES, Latencies(ffn={128: 1.0}), 0.7)


def test_a_budget_that_leaves_nothing_to_choose_is_refused_in_its_unit() -> None:
    with pytest.raises(StageError, match="nanoseconds in what is narrowed"):
        timed(WHOLE, WHOLE, SITES, TABLE, 0.2)


@pytest.mark.parametrize("content", ["[1]", '{"ffn": {"a": 1}}', '{"rest": -1}', '{"fnn": {"64": 1}}', "\udcff"])
def test_what_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "latencies.json"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipeError, match=r"latencies\.json (does not validate|is not valid YAML)"):
        Latencies.read(file)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps(TABLE.model_dump()))
    assert Latencies.read(file) == TABLE
