"""Byte-pair encodings, judged by the tokenizers library's own BPE."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from flabc.compress.bpe import BytePairs, Pair
from flabc.compress.model import TokenizerFiles
from flabc.compress.vocab import remap_tokenizer
from flabc.errors import StageError

#: Ids of the tiny tokenizers' special tokens.
SPECIAL = {0, 1, 2}

ids = st.sets(st.integers(3, 699), max_size=150)
any_text = st.one_of(st.text(max_size=60), st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
fast = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def pairs(byte_level: TokenizerFiles) -> BytePairs:
    return BytePairs.of(byte_level.tokenizer)


def library_bpe(vocab: dict[str, int], merges: Sequence[Pair]) -> Tokenizer:
    """The library's BPE alone: no pre-tokenizer, no added tokens."""
    return Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))


def unreachable(pairs: BytePairs, kept: Iterable[int]) -> set[int]:
    """The kept tokens that the library cannot make of their own symbols with the surviving merges."""
    kept = set(kept)
    vocab = {token: index for token, index in pairs.vocab.items() if index in kept}
    judge = library_bpe(vocab, pairs.surviving_merges(kept))
    return {index for token, index in vocab.items() if index not in SPECIAL and judge.encode(token).ids != [index]}


def cut(files: TokenizerFiles, kept: Iterable[int], **model: Any) -> tuple[Tokenizer, Tokenizer, list[int]]:
    """The dense tokenizer, the cut one, and the old id of each new one; ``model`` changes the BPE's options."""
    content = copy.deepcopy(dict(files.tokenizer))
    content["model"] |= model
    keep = sorted(kept)
    pruned = remap_tokenizer(TokenizerFiles(content, files.config), keep)
    return Tokenizer.from_str(json.dumps(content)), Tokenizer.from_str(json.dumps(pruned.tokenizer)), keep


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_the_symbols_are_the_bytes(pairs: BytePairs) -> None:
    assert {pairs.token_of[index] for index in pairs.symbols} == set(pre_tokenizers.ByteLevel.alphabet())


def test_a_derivation_is_the_one_that_the_library_follows(pairs: BytePairs) -> None:
    for token, index in pairs.vocab.items():
        made = pairs.derivation(token)
        if index in SPECIAL:
            assert made is None
        elif len(token) == 1:
            assert made == []
        else:
            assert made is not None
            # With these merges alone, in any order of the rest, the library makes the token.
            vocab = {part: pairs.vocab[part] for part in {*token, *(a + b for a, b in made)}}
            alone = sorted(set(made), key=pairs.ranks.__getitem__)
            assert library_bpe(vocab, alone).encode(token).ids == [index]


@fast
@given(data=st.data())
def test_any_merges_in_any_order_are_followed_as_the_library_follows_them(data: Any) -> None:
    """Trained merges are tame; these overlap, repeat letters, and make tokens that are never reached."""
    vocab, merges = {"a": 0, "b": 1}, list[Pair]()
    for _ in range(data.draw(st.integers(1, 7))):
        pair = data.draw(st.tuples(st.sampled_from(sorted(vocab)), st.sampled_from(sorted(vocab))))
        vocab.setdefault(pair[0] + pair[1], len(vocab))
        merges += [pair] if pair not in merges else []
    merges = data.draw(st.permutations(merges))
    by_hand, judge = BytePairs(vocab, merges), library_bpe(vocab, merges)
    for token, index in vocab.items():
        assert (by_hand.derivation(token) is not None) == (judge.encode(token).ids == [index])


@fast
@given(wanted=ids)
def test_every_token_of_a_closed_set_is_reachable(pairs: BytePairs, wanted: set[int]) -> None:
    kept = pairs.closure(wanted) | pairs.symbols
    assert wanted <= kept
    assert pairs.closure(kept) == kept
    assert not unreachable(pairs, kept)


def test_without_closure_tokens_become_unreachable(
    pairs: BytePairs, byte_level: TokenizerFiles, texts: tuple[str]
) -> None:
    dense = Tokenizer.from_str(json.dumps(byte_level.tokenizer))
    seen = set(encode(dense, texts[0][:1500]))
    lost = unreachable(pairs, seen | pairs.symbols)
    assert len(lost) > 10
    assert not unreachable(pairs, pairs.closure(seen) | pairs.symbols)
    _, naive, _ = cut(byte_level, seen | pairs.symbols | SPECIAL)
    _, closed, _ = cut(byte_level, pairs.closure(seen) | pairs.symbols | SPECIAL)
    dense_length = len(encode(dense, texts[0][:1500]))
    assert len(encode(closed, texts[0][:1500])) == dense_length < len(encode(naive, texts[0][:1500]))


@fast
@given(wanted=ids, text=any_text)
def test_every_text_survives_the_cut_tokenizer(
    byte_level: TokenizerFiles, pairs: BytePairs, wanted: set[int], text: str
) -> None:
    _, pruned, _ = cut(byte_level, pairs.closure(wanted) | pairs.symbols | SPECIAL)
    assert pruned.decode(encode(pruned, text), skip_special_tokens=False) == text


@fast
@given(wanted=ids, data=st.binary(max_size=80))
def test_bytes_that_are_text_survive_and_the_rest_is_replaced_alike(
    byte_level: TokenizerFiles, pairs: BytePairs, wanted: set[int], data: bytes
) -> None:
    dense, pruned, _ = cut(byte_level, pairs.closure(wanted) | pairs.symbols | SPECIAL)
    text = data.decode("utf-8", "replace")
    assert pruned.decode(encode(pruned, text)) == dense.decode(encode(dense, text)) == text


@pytest.mark.parametrize("ignore_merges", [False, True], ids=["gpt2", "llama3"])
@fast
@given(data=st.data(), wanted=ids)
def test_a_text_whose_tokens_are_all_kept_is_tokenised_as_before(
    byte_level: TokenizerFiles,
    pairs: BytePairs,
    texts: tuple[str, ...],
    ignore_merges: bool,
    data: Any,
    wanted: set[int],
) -> None:
    source = data.draw(st.sampled_from(texts))
    start = data.draw(st.integers(0, len(source) - 200))
    text = source[start : start + data.draw(st.integers(1, 200))]
    original = Tokenizer.from_str(json.dumps(byte_level.tokenizer))
    kept = pairs.closure(wanted | set(encode(original, text))) | pairs.symbols | SPECIAL
    dense, pruned, keep = cut(byte_level, kept, ignore_merges=ignore_merges)
    assert [keep[new] for new in encode(pruned, text)] == encode(dense, text)


@fast
@given(data=st.data(), wanted=ids, counts=st.dictionaries(st.integers(0, 699), st.integers(0, 9)))
def test_shrinking_hits_the_size_and_stays_closed(
    pairs: BytePairs, data: Any, wanted: set[int], counts: dict[int, int]
) -> None:
    kept = pairs.closure(wanted) | pairs.symbols
    fixed = pairs.closure(set(sorted(wanted)[::4])) | pairs.symbols
    size = data.draw(st.integers(len(fixed), len(kept)))
    left = pairs.shrink(kept, fixed, counts, size)
    assert len(left) == size
    assert fixed <= left <= kept
    assert pairs.closure(left) == left


def test_shrinking_drops_the_rarest_leaf_first_and_what_it_alone_needed() -> None:
    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "bc": 5, "cc": 6}
    by_hand = BytePairs(vocab, [("a", "b"), ("ab", "c"), ("b", "c"), ("c", "c")])
    counts = {3: 1, 4: 5, 5: 3, 6: 9}
    everything, fixed = set(range(7)), {0, 1, 2}
    sizes = {size: by_hand.shrink(everything, fixed, counts, size) - fixed for size in (6, 5, 4, 3)}
    # "ab" is the rarest, but "abc" is made of it: it goes only after that.
    assert sizes == {6: {3, 4, 6}, 5: {3, 6}, 4: {6}, 3: set()}


def test_shrinking_below_what_must_stay_is_an_error_that_names_the_limit(pairs: BytePairs) -> None:
    fixed = pairs.closure({600, 650}) | pairs.symbols
    with pytest.raises(StageError, match=f"cannot be cut to 200 rows.*at least {len(fixed)}"):
        pairs.shrink(fixed | pairs.closure({699}), fixed, {}, 200)


@fast
@given(data=st.data(), wanted=ids)
def test_growing_hits_the_size_and_stays_closed(pairs: BytePairs, data: Any, wanted: set[int]) -> None:
    kept = pairs.closure(wanted) | pairs.symbols
    size = data.draw(st.integers(len(kept), len(pairs.vocab) - len(SPECIAL)))
    grown = pairs.grow(kept, size)
    assert len(grown) == size
    assert kept <= grown
    assert pairs.closure(grown) == grown
    assert not unreachable(pairs, grown)


@fast
@given(data=st.data(), wanted=ids, first=st.lists(st.integers(300, 699), max_size=8))
def test_growing_takes_what_was_asked_for_first_where_it_fits(
    pairs: BytePairs, data: Any, wanted: set[int], first: list[int]
) -> None:
    kept = pairs.closure(wanted) | pairs.symbols
    size = data.draw(st.integers(len(kept), len(kept) + 20))
    expected = set(kept)
    for index in first:
        with_it = pairs.closure(expected | {index})
        expected = with_it if len(with_it) <= size else expected
    grown = pairs.grow(kept, size, first)
    assert expected <= grown
    assert len(grown) == size
    assert pairs.closure(grown) == grown


def test_added_tokens_behind_the_vocabulary_are_made_of_nothing(with_added: TokenizerFiles) -> None:
    """Qwen2.5 and Llama 3 keep their special tokens outside the BPE's own vocabulary."""
    outside = BytePairs.of(with_added.tokenizer)
    assert 700 not in outside.token_of
    assert outside.closure({700, 701}) == {700, 701}


def test_merges_written_as_strings_are_read_alike(byte_level: TokenizerFiles, pairs: BytePairs) -> None:
    content = copy.deepcopy(dict(byte_level.tokenizer))
    content["model"]["merges"] = [" ".join(pair) for pair in pairs.merges]
    assert BytePairs.of(content).merges == pairs.merges
