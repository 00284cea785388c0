"""KL between models of different vocabularies, against torch."""

from __future__ import annotations

from pathlib import Path

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


def test_a_vocabulary_that_is_no_part_is_refused(tiny_engine: Path, tiny_dense_engine: Path) -> None:
    with pytest.raises(EngineError, match="part of the dense model's"):
        shared_ids(Session.open(tiny_dense_engine).codec, Session.open(tiny_engine).codec)
