"""Tokenizers that are not byte-level, judged by the tokenizers library: SentencePiece's BPE, and Unigram."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flabc.compress.model import TokenizerFiles
from flabc.compress.subwords import read
from flabc.compress.vocab import remap_tokenizer
from flabc.errors import FlabcError, StageError, UnknownNameError

from .conftest import documents

BYTES = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]

KINDS = ("sentencepiece-bpe", "llama2-bpe", "unigram-bytes", "unigram")


@functools.cache
def trained(kind: str) -> dict[str, Any]:
    """The ``tokenizer.json`` of a tokenizer trained on the standard library, laid out as its models are."""
    specials = SPECIAL if kind == "unigram" else [*SPECIAL, *BYTES]
    tokenizer: Any
    if "bpe" in kind:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        trainer: Any = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=800, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([document.text for document in documents("calibration")], trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if kind == "llama2-bpe":  # the whole text is one word
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] in SPECIAL]
    if kind == "unigram-bytes":
        content["model"]["byte_fallback"] = True
    return content


def cut(kind: str, wanted: Iterable[int]) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The dense tokenizer, the cut one, and the old id of each new one."""
    content = trained(kind)
    subwords = read(content)
    keep = sorted(subwords.closure(set(wanted) | {0, 1, 2}) | subwords.symbols)
    pruned = remap_tokenizer(TokenizerFiles(content, {}), keep)
    return Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(pruned.tokenizer)), keep


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


sizes = settings(max_examples=40, deadline=None)
ids = st.sets(st.integers(259, 700), max_size=200)
each = pytest.mark.parametrize("kind", KINDS)


@each
@sizes
@given(wanted=ids, text=st.text(max_size=60))
def test_every_text_comes_back_as_from_the_dense_tokenizer(kind: str, wanted: set[int], text: str) -> None:
    dense, pruned, _ = cut(kind, wanted)
    assert pruned.decode(encode(pruned, text)) == dense.decode(encode(dense, text))
    if kind != "unigram":
        assert 0 not in encode(pruned, text)  # bytes stand in for what is unknown


@each
@sizes
@given(wanted=ids, data=st.data())
def test_a_text_whose_tokens_are_all_kept_is_tokenised_as_before(kind: str, wanted: set[int], data: Any) -> None:
    source = data.draw(st.sampled_from([document.text for document in documents("heldout")]))
    start = data.draw(st.integers(0, len(source) - 150))
    text = source[start : start + data.draw(st.integers(1, 150))]
    dense = Tokenizer.from_str(json.dumps(trained(kind)))
    before = encode(dense, text)
    _, pruned, keep = cut(kind, wanted | set(before))
    assert [keep[new] for new in encode(pruned, text)] == before


@each
@sizes
@given(wanted=ids)
def test_what_was_reachable_stays_reachable(kind: str, wanted: set[int]) -> None:
    """A token is reachable if the model makes it of its own text."""
    dense, pruned, keep = cut(kind, wanted)
    new = {old: at for at, old in enumerate(keep)}
    for old in keep:
        token = dense.id_to_token(old)
        alone = [found.id for found in dense.model.tokenize(token)] == [old]
        if alone and old > 2:
            assert [found.id for found in pruned.model.tokenize(token)] == [new[old]]


@each
def test_shrinking_and_growing_hit_their_sizes(kind: str) -> None:
    subwords = read(trained(kind))
    fixed = subwords.closure({0, 1, 2}) | subwords.symbols
    everything = subwords.closure(set(range(700)) | fixed)
    less = subwords.shrink(everything, set(fixed), {}, len(everything) - 100)
    assert len(less) == len(everything) - 100
    assert subwords.closure(less) == less >= fixed
    more = subwords.grow(less, len(less) + 50)
    assert len(more) == len(less) + 50
    assert subwords.closure(more) == more


def test_the_unknown_piece_and_its_price_stay() -> None:
    content = trained("unigram")
    dense, pruned, _ = cut("unigram", ())
    text = "naïve 漢字 x"
    assert 0 in encode(dense, text)
    remapped = json.loads(pruned.to_str())["model"]
    assert remapped["vocab"][remapped["unk_id"]][0] == "<unk>"
    assert min(score for _, score in remapped["vocab"]) == min(score for _, score in content["model"]["vocab"])


def refused(model: Any) -> FlabcError:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(FlabcError) as caught:
        read(json.loads(tokenizer.to_str()))
    return caught.value


def test_other_kinds_are_refused_by_name() -> None:
    assert isinstance(refused(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), UnknownNameError)
    assert "WordLevel" in str(refused(models.WordLevel({"a": 0}, unk_token="a")))
    wordy = refused(models.BPE({"a": 0}, []))
    assert isinstance(wordy, StageError)
    assert "byte-level BPE, or one with byte_fallback" in str(wordy)
