"""Text that the dense model writes to be listened to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flabc.compress import generated, load, pipeline
from flabc.compress.config import Calibration, Target
from flabc.compress.data import corpus
from flabc.compress.model import cut_channels
from flabc.compress.preflight import streams
from flabc.compress.stage import encoder
from flabc.errors import UsageError

SHORT = Calibration(corpus="python-stdlib", sequences=6, sequence_length=32, generated=True)


@pytest.fixture
def documents() -> list[corpus.Document]:
    return corpus.load("python-stdlib", "calibration")[:60]


def write(model: object, documents: list[corpus.Document], seed: int = 0) -> list[corpus.Document]:
    return generated.written(
        model,  # type: ignore[arg-type]
        documents,
        SHORT,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=seed,
    )


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "gemma2-tied", "phi3-untied"])
def test_it_goes_on_from_the_beginnings_of_others(
    tiny: Callable[[str], Path], documents: list[corpus.Document], name: str
) -> None:
    model = load.load(str(tiny(name)))
    found = write(model, documents)
    assert generated.needed(SHORT) == 3 <= len(found) <= generated.count(SHORT) == 4
    assert {document.corpus for document in found} == {"generated"}
    tokenizer = encoder(model.tokenizer)
    whole = "\n".join(document.text for document in documents)
    for document in found:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        assert len(ids) >= SHORT.sequence_length
        given = tokenizer.decode(ids[:4])
        assert given.strip() in whole
        assert document.text not in whole


def test_a_model_whose_layers_differ_writes_too(tiny: Callable[[str], Path], documents: list[corpus.Document]) -> None:
    uneven = cut_channels(load.load(str(tiny("llama-tied"))), {1: range(32)})
    assert not uneven.spec.is_uniform
    assert len(write(uneven, documents)) >= generated.needed(SHORT)
    network = generated._network(uneven, torch.bfloat16)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}  # angles of positions


def test_what_it_writes_is_what_transformers_samples(
    tiny: Callable[[str], Path], documents: list[corpus.Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a temperature near nought that is what is most likely, token by token."""
    from transformers import AutoModelForCausalLM

    folder = tiny("llama-tied")
    monkeypatch.setattr(generated, "TEMPERATURE", 1e-6)
    model = load.load(str(folder))
    tokenizer = encoder(model.tokenizer)
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    special = [e["id"] for e in json.loads((folder / "tokenizer.json").read_text())["added_tokens"] if e["special"]]
    given = round(SHORT.sequence_length * generated.GIVEN)
    for document in write(model, documents):
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        with torch.no_grad():
            logits = network(torch.tensor([ids[:given]])).logits[0, -1]
        logits[special] = -torch.inf
        text = tokenizer.decode([*ids[:given], int(logits.argmax())])
        assert document.text.startswith(text.rstrip("\ufffd"))


def test_a_seed_gives_the_same_text_and_leaves_the_callers_numbers_alone(
    tiny: Callable[[str], Path], documents: list[corpus.Document]
) -> None:
    model = load.load(str(tiny("llama-tied")))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = write(model, documents)
    assert torch.equal(torch.rand(3), expected)
    assert [d.text for d in write(model, documents)] == [d.text for d in first]
    assert [d.text for d in write(model, documents, seed=1)] != [d.text for d in first]


def test_it_counts_as_one_corpus_more(tiny: Callable[[str], Path]) -> None:
    model = load.load(str(tiny("llama-tied")))
    context = pipeline.context_of(model, Target(params=0.9), SHORT, "cpu", 0)
    texts = [document.text for document in context.documents if document.corpus == "generated"]
    drawn = [encoder(model.tokenizer).decode(row.tolist()) for row in context.tokens(model)]
    assert len(drawn) == SHORT.sequences
    of_its_own = [row for row in drawn if any(row.strip("\ufffd")[-16:-2] in text for text in texts)]
    assert len(of_its_own) == 3
    assert not any(document.corpus == "generated" for document in context.heldout)


def test_a_model_that_is_read_from_disk_does_not_write(tiny: Callable[[str], Path]) -> None:
    spec = load.load(str(tiny("llama-tied"))).spec
    asked = {"dtype": torch.float32, "memory": 10**10, "can_stream": True}
    plain = SHORT.model_copy(update={"generated": False})
    assert streams(spec, 10**10, [], plain, **asked)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"calibrate without generated text"):
        streams(spec, 10**10, [], SHORT, **asked)  # type: ignore[arg-type]
