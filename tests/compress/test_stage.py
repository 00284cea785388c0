"""Calibration windows: where they come from, and how they begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from flabc.compress.data.corpus import Document
from flabc.compress.model import CausalLM
from flabc.compress.stage import Context, encoder, openings, sequences
from flabc.errors import CorpusError


def test_sequences_begin_as_they_do_where_the_model_serves(
    tied: CausalLM, make_context: Callable[..., Context], any_tiny: Path
) -> None:
    from transformers import AutoTokenizer

    plain, chat = openings(tied)
    assert plain == []
    theirs = AutoTokenizer.from_pretrained(any_tiny)
    prompt = theirs.apply_chat_template([{"role": "user", "content": "q"}])["input_ids"]
    assert chat
    assert prompt[: len(chat)] == chat
    begins = [row.tolist() for row in make_context(tied, sequences=6).tokens(tied)]
    for at, row in enumerate(begins):
        opening = (plain, chat)[at % 2]
        assert row[: len(opening)] == opening
        assert len(row) == 48
    assert begins[0][0] != chat[0]


def test_text_begins_with_what_its_tokenizer_puts_there(tied: CausalLM) -> None:
    token, index = "<|endoftext|>", tied.config["eos_token_id"]
    tokenizer = encoder(tied.tokenizer)
    tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])
    files = replace(tied.tokenizer, tokenizer=json.loads(tokenizer.to_str()), chat_template=None)
    assert openings(replace(tied, tokenizer=files)) == [[index]]
    assert openings(replace(tied, tokenizer=replace(tied.tokenizer, chat_template=None))) == [[]]


def test_first_tokens_are_the_most_frequent_of_the_sequences(
    tied: CausalLM, make_context: Callable[..., Context]
) -> None:
    tokens = torch.tensor([[3, 3, 3, 7], [9, 7, 3, 2], [9, 9, 7, 7], [7, 2, 2, 2]])
    assert make_context(tied).firsts(tied, tokens) is None
    (found,) = make_context(tied, first_tokens=0.2).firsts(tied, tokens)
    assert found.tolist() == [7, 2, 3, 9]  # 5, 4, 4 and 3 times
    twice = make_context(tied, first_tokens=0.5).firsts(tied, tokens)
    assert twice.tolist() == [[7, 2, 3, 9]] * 2  # there are no more


def test_a_text_that_begins_with_its_tokenizers_token_has_no_other_first_one(
    tied: CausalLM, make_context: Callable[..., Context]
) -> None:
    tokenizer = encoder(tied.tokenizer)
    special = [("<|endoftext|>", tied.config["eos_token_id"])]
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=special)
    begun = replace(tied, tokenizer=replace(tied.tokenizer, tokenizer=json.loads(tokenizer.to_str())))
    context = make_context(tied, first_tokens=1.0)
    tokens = torch.tensor([[1, 2]])
    assert context.firsts(tied, tokens) is not None
    assert context.firsts(begun, tokens) is None


def test_corpora_and_openings_take_turns_independently(tied: CausalLM) -> None:
    tokenizer = encoder(tied.tokenizer)
    documents = [Document(str(n), f"{word} " * 200, word) for word in ("import", "return") for n in range(8)]
    rows = sequences(tokenizer, documents, 12, 20, 0, [[], [1], [2]])
    text = [tokenizer.decode(row.tolist()[1:]) for row in rows]
    assert ["import" in each for each in text] == [True, False] * 6
    first = [row[0].item() if row[0] in (1, 2) else None for row in rows]
    assert first == [None, None, 1, 1, 2, 2] * 2


def test_too_little_text_is_told_for_the_corpus_that_lacks_it(tied: CausalLM) -> None:
    documents = [Document("a", "import " * 400, "long"), Document("b", "x", "short")]
    with pytest.raises(CorpusError, match="fills 0 windows of 20 tokens"):
        sequences(encoder(tied.tokenizer), documents, 2, 20, 0)
