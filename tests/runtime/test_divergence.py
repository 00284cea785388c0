"""KL between models of different vocabularies, against torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flabc.errors import EngineError
from flabc.runtime.evaluate.divergence import Divergence, shared_ids
from flabc.runtime.evaluate.perplexity import opening
from flabc.runtime.session import Session

TEXT = "class Point:\n    def __init__(self, x: int) -> None:\n        self.x = x\n" * 12


def test_kl_is_torchs_over_the_tokens_that_both_have(tiny_engine: Path, tiny_dense_engine: Path) -> None:
    dense, pruned = Session.open(tiny_dense_engine), Session.open(tiny_engine)
    assert dense.spec.vocab_size > pruned.spec.vocab_size
    found = Divergence(dense, pruned).measure(TEXT)

    names = {index: token for token, index in pruned.codec.tokenizer.get_vocab().items()}
    to_dense = [dense.codec.tokenizer.token_to_id(names[index]) for index in range(len(names))]
    ids = [*opening(pruned.codec), *pruned.codec.encode_plain(TEXT)]
    q = torch.tensor(pruned.backend.score(np.array([ids])))[0, :-1, : len(names)].double().log_softmax(-1)
    whole = torch.tensor(dense.backend.score(np.array([[to_dense[i] for i in ids]])))[0, :-1].double()
    p = whole[:, to_dense].log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert found["positions"] == len(ids) - 1 > 128
    assert found["kl_nats"] == pytest.approx(float(kl), rel=1e-4)
    outside = (1 - whole.softmax(-1)[:, to_dense].sum(-1)).sum()
    assert found["outside"] == pytest.approx(float(outside), rel=1e-3)
    assert found["agree"] == float((p.argmax(-1) == q.argmax(-1)).sum())


def test_a_model_is_no_distance_from_itself(tiny_engine: Path) -> None:
    session = Session.open(tiny_engine)
    found = Divergence(session, session).measure(TEXT)
    assert found["kl_nats"] == pytest.approx(0, abs=1e-3)
    assert found["agree"] == found["positions"]


def test_long_texts_are_read_in_windows(tiny_engine: Path, tiny_dense_engine: Path) -> None:
    dense, pruned = Session.open(tiny_dense_engine), Session.open(tiny_engine)
    long = TEXT * 12
    assert len(pruned.codec.encode_plain(long)) > pruned.spec.max_position_embeddings
    found = Divergence(dense, pruned).measure(long)
    assert found["positions"] == len(pruned.codec.encode_plain(long))


def test_sums_over_a_large_vocabulary_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    dense, pruned = 40_000, np.sort(rng.choice(40_000, 30_000, replace=False))
    left = rng.permutation(pruned)
    expected = rng.normal(0, 4, (1, 12, dense)).astype(np.float32)
    found = (expected[..., left] + rng.normal(0, 1, (1, 12, len(left)))).astype(np.float32)
    text = "x" * 11
    ids = {"dense": int(left[0]), "pruned": 0}

    def session(logits: np.ndarray, tokens: Sequence[int], name: str) -> Any:
        tokenizer = SimpleNamespace(get_vocab=lambda: {f"t{token}": index for index, token in enumerate(tokens)})
        codec = SimpleNamespace(tokenizer=tokenizer, before_text=lambda: [ids[name]], encode_plain=lambda _: [0] * 11)
        spec = SimpleNamespace(max_position_embeddings=64)
        return SimpleNamespace(codec=codec, backend=SimpleNamespace(spec=spec, score=lambda _: logits))

    measured = Divergence(session(expected, range(dense), "dense"), session(found, left, "pruned")).measure(text)
    whole, q = torch.tensor(expected[0, :-1]).double(), torch.tensor(found[0, :-1]).double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, whole[:, left].log_softmax(-1), log_target=True, reduction="sum")
    assert measured["kl_nats"] == pytest.approx(float(kl), rel=1e-6)
    assert measured["outside"] == pytest.approx(float((1 - whole.softmax(-1)[:, left].sum(-1)).sum()), rel=1e-6)


def test_a_vocabulary_that_is_no_part_is_refused(tiny_engine: Path, tiny_dense_engine: Path) -> None:
    with pytest.raises(EngineError, match="part of the dense model's"):
        shared_ids(Session.open(tiny_dense_engine).codec, Session.open(tiny_engine).codec)
