"""Decisions: against scipy, against textbooks' rules, and how often they are wrong on drawn numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flabc.perf.sequential import LOOKS, decide, effect, holm, share

ALPHA = 0.05


def outcome(numbers: np.ndarray[tuple[int], np.dtype[np.float64]], limit: float) -> tuple[str, int]:
    """What a gate with one speed says, and after how many openings."""
    for look in LOOKS:
        found = effect(list(numbers[:look]), limit, alpha=share(ALPHA))
        said = decide({"tpot_ms": found}, alpha=share(ALPHA))["tpot_ms"]
        if said != "undecided":
            return said, look
    return "undecided", LOOKS[-1]


def drawn(seed: int, change: float, spread: float = 0.03) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Logarithms of ratios with heavy tails, as a busy machine gives them."""
    return math.log(1 + change) + spread * np.random.default_rng(seed).standard_t(3, LOOKS[-1])


def test_no_change_raises_no_alarm_and_is_passed() -> None:
    said = [outcome(drawn(seed, 0.0), 1.03)[0] for seed in range(100)]
    assert said.count("fail") == 0
    assert said.count("pass") > 95


def test_a_change_at_the_limit_alarms_no_more_often_than_allowed() -> None:
    said = [outcome(drawn(seed, 0.03), 1.03)[0] for seed in range(100)]
    assert said.count("fail") <= 0.05 * 100


@pytest.mark.parametrize(("change", "caught", "pairs"), [(0.10, 58, 27), (0.05, 45, 90)])
def test_a_slower_engine_is_caught(change: float, caught: int, pairs: int) -> None:
    said = [outcome(drawn(seed, change), 1.02) for seed in range(60)]
    assert sum(each == "fail" and look <= pairs for each, look in said) >= caught


def test_the_effect_is_the_middle_of_the_pairs_and_outliers_do_not_drag_it() -> None:
    numbers = [*np.random.default_rng(0).normal(math.log(1.1), 0.01, 39), 3.0]
    found = effect(numbers, 1.03, alpha=ALPHA)
    assert found.ratio == pytest.approx(1.1, abs=0.01)
    assert found.interval[0] < 1.1 < found.interval[1] < 1.12
    assert found.count == 40


@given(st.lists(st.floats(-1, 1), min_size=8, max_size=30), st.floats(0.9, 1.2))
def test_the_interval_holds_the_ratio_and_p_values_are_probabilities(numbers: list[float], limit: float) -> None:
    found = effect(numbers, limit, alpha=ALPHA)
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert 0 <= found.above <= 1
    assert 0 <= found.below <= 1
    assert max(found.above, found.below) >= 0.5  # not both can be refuted


def test_no_numbers_are_an_error() -> None:
    with pytest.raises(ValueError, match="no numbers"):
        effect([], 1.03, alpha=ALPHA)


def test_holm_by_its_paper() -> None:
    p_values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p_values, 0.05) == {"a", "d"}  # 0.005 <= 0.05/4, 0.01 <= 0.05/3, but 0.03 > 0.05/2
    assert holm({"a": 0.05}, 0.05) == {"a"}
    assert holm({}, 0.05) == set()


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=6))
def test_holm_refutes_no_more_than_each_alone_and_no_less_than_bonferroni(p_values: dict[str, float]) -> None:
    refuted = holm(p_values, ALPHA)
    assert {name for name, p in p_values.items() if p <= ALPHA / max(len(p_values), 1)} <= refuted
    assert refuted <= {name for name, p in p_values.items() if p <= ALPHA}
