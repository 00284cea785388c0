"""Prompts in a batch are answered as each would be alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flabc.errors import EngineError, UsageError
from flabc.runtime.backend import Limits
from flabc.runtime.batch import compact, generate_batch
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

TEXT = "def add(a, b):\n    return a + b\n\n\nclass Point:\n    def __init__(self, x: int) -> None:\n"


@pytest.fixture(params=["tiny_engine", "tiny_checkpoint"])
def session(request: pytest.FixtureRequest) -> Session:
    return Session.open(request.getfixturevalue(request.param), limits=Limits(max_batch=3, max_length=96))


def test_each_is_answered_as_alone(session: Session) -> None:
    ids = session.codec.encode_plain(TEXT)
    prompts = [ids[at : at + size] for at, size in [(0, 5), (3, 17), (1, 1), (8, 9), (2, 30), (6, 17), (4, 2)]]
    params = [
        SamplingParams(
            max_tokens=6 + 7 * (n % 3), temperature=0.8 * (n % 2), seed=n, ignore_eos=True, stop=("e",) * (n > 3)
        )
        for n in range(len(prompts))
    ]
    alone = [next(generate_batch(session, [prompt], [param]))[1] for prompt, param in zip(prompts, params, strict=True)]
    together = dict(generate_batch(session, prompts, params))
    assert [together[n] for n in range(len(prompts))] == alone
    for prompt, param, answer in zip(prompts, params, alone, strict=True):
        tokens = session.tokens(prompt, param)
        assert [next(tokens).id for _ in answer.token_ids] == list(answer.token_ids)


def test_what_cannot_be_answered_is_told_before_anything_runs(session: Session) -> None:
    with pytest.raises(EngineError, match=r"100 tokens.*fewer than 96"):
        next(generate_batch(session, [[5], [5] * 100], [SamplingParams()] * 2))
    with pytest.raises(UsageError, match="2 prompts and 1"):
        next(generate_batch(session, [[5], [6]], [SamplingParams()]))


def test_a_batch_that_is_full_takes_no_more(session: Session) -> None:
    session.backend.start(2)
    session.backend.extend(np.array([[5], [6]]), np.array([1, 1]))
    with pytest.raises(EngineError, match=r"batch of 4.*at most 3"):
        session.backend.join(np.array([[5], [6]]), np.array([1, 1]))


@given(st.lists(st.booleans(), max_size=20))
def test_gaps_are_filled_from_behind(stays: list[bool]) -> None:
    rows = compact(stays)
    assert sorted(rows) == [row for row, kept in enumerate(stays) if kept]
    assert all(row == place or row >= len(rows) for place, row in enumerate(rows))
