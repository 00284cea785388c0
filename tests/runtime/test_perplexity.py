from __future__ import annotations

from math import log
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flabc.errors import CorpusError
from flabc.runtime.evaluate import perplexity as module
from flabc.runtime.evaluate.perplexity import Perplexity, perplexity, token_nll, windows
from flabc.runtime.session import Session


@given(st.integers(0, 300), st.integers(2, 50), st.integers(1, 49))
def test_every_token_but_the_first_is_predicted_once(length: int, window: int, stride: int) -> None:
    stride = min(stride, window - 1)
    predicted: list[int] = []
    for part, new in windows(length, window, stride):
        assert part.stop - part.start <= window
        assert new < part.stop - part.start or part.start == 0
        predicted += range(part.stop - new, part.stop)
    assert predicted == list(range(1, length))


def test_token_losses_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 5, (9, 30)).astype(np.float32), rng.integers(0, 30, 9)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:-1]), torch.from_numpy(ids[1:]), reduction="none"
    )
    np.testing.assert_allclose(token_nll(logits, ids), expected.numpy(), rtol=1e-5)


def test_the_sum_is_the_loss_of_transformers(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    session = Session.open(tiny_engine)
    text = "def f(x):\n    return x + 1\n"
    found = perplexity(session.backend, session.codec, [text])
    ids = torch.tensor([[session.codec.prefix_id, *session.codec.encode_plain(text)]])
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(ids, labels=ids).loss
    assert found.tokens == ids.shape[1] - 1
    assert found.nll_nats == pytest.approx(float(loss) * found.tokens, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(found.nll_nats / log(2) / len(text))


def test_windows_change_nothing_when_the_text_fits(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(tiny_engine)
    text = "for i in range(10):\n    print(i)\n" * 8
    whole = perplexity(session.backend, session.codec, [text])
    monkeypatch.setattr(module, "WINDOW", 40)
    monkeypatch.setattr(module, "STRIDE", 20)
    strided = perplexity(session.backend, session.codec, [text])
    assert strided.tokens == whole.tokens
    assert strided.nll_nats != whole.nll_nats
    assert strided.nll_nats == pytest.approx(whole.nll_nats, rel=0.2)


def test_the_same_count_makes_two_tokenizers_comparable() -> None:
    a, b = (Perplexity(nll_nats=100, tokens=t, bytes=200, documents=1) for t in (50, 60))
    assert a.perplexity != b.perplexity
    assert a.per(50) == b.per(50) == a.perplexity
    assert a.bits_per_byte == b.bits_per_byte


def test_no_text_is_refused(tiny_engine: Path) -> None:
    session = Session.open(tiny_engine)
    with pytest.raises(CorpusError):
        perplexity(session.backend, session.codec, [])
