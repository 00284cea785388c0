from __future__ import annotations

from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from flabc.errors import CorpusError
from flabc.runtime.evaluate import perplexity as module
from flabc.runtime.evaluate.perplexity import Perplexity, opening, perplexity, target_nll, windows
from flabc.runtime.session import Session

CODE = "for i in range(10):\n    print(i)\n" * 8


@given(st.integers(0, 300), st.integers(2, 50), st.integers(1, 49), st.integers(1, 4))
def test_every_token_that_is_not_given_is_predicted_once(length: int, window: int, stride: int, ahead: int) -> None:
    stride, ahead = min(stride, window - 1), min(ahead, window)
    predicted: list[int] = []
    for part, new in windows(length, window, stride, given=ahead):
        assert part.stop - part.start <= window
        assert new < part.stop - part.start or part.start == 0
        predicted += range(part.stop - new, part.stop)
    assert predicted == list(range(ahead, length))


def test_token_losses_are_those_of_torch() -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(0, 5, (9, 30)).astype(np.float32), rng.integers(0, 30, 9)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:-1]), torch.from_numpy(ids[1:]), reduction="none"
    )
    np.testing.assert_allclose(target_nll(logits[:-1], ids[1:]), expected.numpy(), rtol=1e-5)


def test_the_sum_is_the_loss_of_transformers(tiny_engine: Path, tiny_checkpoint: Path) -> None:
    from transformers import AutoModelForCausalLM

    session = Session.open(tiny_engine)
    text = "def f(x):\n    return x + 1\n"
    found = perplexity(session.backend, session.codec, [text])
    ids = torch.tensor([session.codec.encode_plain("\n" + text)])
    assert ids.shape[1] == len(session.codec.encode_plain(text)) + 1, "a line break of its own"
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)(ids, labels=ids).loss
    assert found.tokens == ids.shape[1] - 1
    assert found.nll_nats == pytest.approx(float(loss) * found.tokens, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(found.nll_nats / log(2) / len(text))


def test_a_text_is_scored_behind_what_its_tokenizer_puts_there(tiny_engine: Path) -> None:
    codec = Session.open(tiny_engine).codec
    assert opening(codec) == codec.encode_plain("\n")
    [end] = codec.eos_ids
    token = codec.tokenizer.id_to_token(end)
    codec.tokenizer.post_processor = TemplateProcessing(single=f"{token} $A {token}", special_tokens=[(token, end)])
    assert codec.encode("x") == [end, *codec.encode_plain("x"), end]
    assert opening(codec) == [end]


def strided_loss(model: Any, ids: torch.Tensor, window: int, stride: int) -> tuple[float, int]:
    """The loop of transformers' documentation ("Perplexity of fixed-length models"), and the tokens it scored."""
    total, scored, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100  # scored already; nothing is masked in the first window
        count = int((labels[:, 1:] != -100).sum())
        if count:
            with torch.no_grad():
                total += float(model(ids[:, begin:end], labels=labels).loss) * count
        scored, before = scored + count, end
        if end == ids.shape[1]:
            break
    return total, scored


def tokens_as_text(ids: list[int]) -> Any:
    """A codec for a text whose tokens are these."""
    return SimpleNamespace(encode_plain=lambda _: ids[1:], before_text=lambda: ids[:1])


@pytest.mark.parametrize(("window", "stride"), [(40, 20), (48, 16), (None, None)])
def test_strided_windows_give_the_loss_that_transformers_documents(
    tiny_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, window: int | None, stride: int | None
) -> None:
    from transformers import AutoModelForCausalLM

    session = Session.open(tiny_engine)
    if window is not None:
        monkeypatch.setattr(module, "WINDOW", window)
        monkeypatch.setattr(module, "STRIDE", stride)
    else:  # as shipped: the model has fewer positions than a window
        window, stride = session.spec.max_position_embeddings, session.spec.max_position_embeddings // 2
        assert window <= module.STRIDE
    assert stride is not None
    ids = np.random.default_rng(0).integers(3, 500, window + 3 * stride)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    expected, scored = strided_loss(model, torch.from_numpy(ids)[None], window, stride)
    found = perplexity(session.backend, tokens_as_text(ids.tolist()), ["any"])
    assert found.tokens == scored == len(ids) - 1
    assert found.nll_nats == pytest.approx(expected, rel=1e-5)


def test_a_text_that_fits_is_scored_as_one_window(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.open(tiny_engine)
    usual = perplexity(session.backend, session.codec, [CODE])
    monkeypatch.setattr(module, "WINDOW", usual.tokens + 1)
    for stride in (1, 7, usual.tokens):
        monkeypatch.setattr(module, "STRIDE", stride)
        assert perplexity(session.backend, session.codec, [CODE]) == usual


def test_several_texts_are_scored_each_on_its_own(tiny_engine: Path) -> None:
    session = Session.open(tiny_engine)
    texts = ["import os\n", "größe = 3\n"]
    alone = [perplexity(session.backend, session.codec, [text]) for text in texts]
    both = perplexity(session.backend, session.codec, texts)
    assert (both.tokens, both.documents) == (alone[0].tokens + alone[1].tokens, 2)
    assert both.bytes == len("".join(texts).encode())
    assert both.nll_nats == pytest.approx(alone[0].nll_nats + alone[1].nll_nats)


def test_the_same_count_makes_two_tokenizers_comparable() -> None:
    a, b = (Perplexity(nll_nats=100, tokens=t, bytes=200, documents=1) for t in (50, 60))
    assert a.perplexity != b.perplexity
    assert a.per(50) == b.per(50) == a.perplexity
    assert a.bits_per_byte == b.bits_per_byte


def test_no_text_is_refused(tiny_engine: Path) -> None:
    session = Session.open(tiny_engine)
    with pytest.raises(CorpusError):
        perplexity(session.backend, session.codec, [])
