"""The vocabulary stage, judged by tokenizers and transformers."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from flabc.compress import checkpoint, load, vocab
from flabc.compress.bpe import BytePairs
from flabc.compress.config import VocabConfig
from flabc.compress.data.corpus import Document
from flabc.compress.inflation import windows
from flabc.compress.model import CausalLM, TokenizerFiles
from flabc.compress.stage import Context
from flabc.errors import StageError

from .conftest import transformers_model

MakeContext = Callable[..., Context]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def vocab_config(**fields: Any) -> VocabConfig:
    return VocabConfig.model_validate(fields)


def library(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer as the library reads it, without flabc's help."""
    return Tokenizer.from_str(json.dumps(files.tokenizer))


def least_kept(model: CausalLM) -> set[int]:
    """Everything that no cut may touch."""
    pairs = BytePairs.of(model.tokenizer.tokenizer)
    return pairs.closure(vocab.must_keep(model, library(model.tokenizer))) | pairs.symbols


@pytest.fixture(scope="module")
def padded(tiny: Callable[[str], Path], with_added: TokenizerFiles) -> CausalLM:
    """A model laid out like Qwen2.5: 700 tokens, two added ones behind them, two padding rows that are no token's."""
    model = load.load(str(tiny("llama-tied")))
    name = "model.embed_tokens.weight"
    rows = torch.cat([model.weights[name], torch.full((4, model.spec.hidden_size), 0.5)])
    return replace(
        model,
        spec=model.spec.model_copy(update={"vocab_size": 704}),
        config={**model.config, "vocab_size": 704, "pad_token_id": 700},
        generation_config={
            "eos_token_id": [2, 700],
            "suppress_tokens": [701],
            "max_length": 2,
            "bad_words_ids": [[1, 2]],
        },
        weights={**model.weights, name: rows},
        tokenizer=with_added,
        token_origin=tuple(range(704)),
    )


def test_tokens_are_counted_as_transformers_counts_them(
    tied: CausalLM, make_context: MakeContext, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    context = make_context(tied)
    checkpoint.write_tokenizer(tied, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected: Counter[int] = Counter()
    for document in context.documents:
        expected.update(theirs(document.text, add_special_tokens=False)["input_ids"])
    (found,) = vocab.count_tokens(vocab.encoder(tied.tokenizer), context.documents, tied.spec.vocab_size).values()
    assert {index: count for index, count in enumerate(found.tolist()) if count} == expected


def test_a_tokenizer_file_that_truncates_and_pads_is_read_whole(padded: CausalLM, make_context: MakeContext) -> None:
    context = make_context(padded)
    free = library(padded.tokenizer)
    assert free.truncation
    assert free.padding
    free.no_truncation()
    free.no_padding()
    expected = sum(len(free.encode(d.text, add_special_tokens=False).ids) for d in context.documents)
    (found,) = vocab.count_tokens(vocab.encoder(padded.tokenizer), context.documents, 704).values()
    assert found.sum() == expected


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=30), coverage=st.floats(0.01, 1))
def test_the_frequent_tokens_are_the_fewest_that_cover(counts: list[int], coverage: float) -> None:
    chosen = vocab.frequent(np.array(counts, dtype=np.int64), coverage)
    covered = sum(counts[index] for index in chosen)
    assert covered >= coverage * sum(counts) - 1e-9
    assert all(counts[index] for index in chosen)
    if chosen:
        assert covered - min(counts[index] for index in chosen) < coverage * sum(counts)
        rest = [count for index, count in enumerate(counts) if index not in chosen]
        assert max(rest, default=0) <= min(counts[index] for index in chosen)


@settings(max_examples=25, deadline=None)
@given(
    coverage=st.floats(0.2, 1),
    multiple_of=st.sampled_from([1, 8, 32, 64]),
    max_size=st.none() | st.integers(380, 700),
    keep=st.none() | st.floats(0.5, 1.0),
)
def test_the_number_of_rows_is_what_was_asked_for(
    padded: CausalLM,
    make_context: MakeContext,
    coverage: float,
    multiple_of: int,
    max_size: int | None,
    keep: float | None,
) -> None:
    context = make_context(padded, keep=keep)
    config = vocab_config(coverage=coverage, multiple_of=multiple_of, max_size=max_size)
    made = vocab.plan(padded, config, context)
    rows, spare = len(made.keep), context.spare(padded)
    assert rows % multiple_of == 0 or rows == padded.spec.vocab_size
    left = vocab.apply(padded, made).spec.num_parameters
    assert left > (context.target_parameters or 0) - multiple_of * padded.spec.hidden_size
    least = padded.spec.vocab_size - spare // padded.spec.hidden_size  # one row more would be too many
    assert max_size is None or rows <= max_size or rows < least + multiple_of
    assert list(made.keep) == sorted(set(made.keep))
    assert least_kept(padded) <= set(made.keep)
    pairs = BytePairs.of(padded.tokenizer.tokenizer)
    assert pairs.closure(made.keep) == set(made.keep)


def test_without_anything_to_spare_no_row_goes(padded: CausalLM, make_context: MakeContext) -> None:
    made = vocab.plan(padded, vocab_config(coverage=0.5, multiple_of=1), make_context(padded, keep=1.0))
    assert made.keep == tuple(range(704))


def test_a_size_that_cannot_be_reached_is_an_error(tied: CausalLM, make_context: MakeContext) -> None:
    with pytest.raises(StageError, match="chat template"):
        vocab.plan(tied, vocab_config(max_size=128), make_context(tied))


def test_the_rows_kept_are_the_rows_of_the_tokens_kept(untied: CausalLM, make_context: MakeContext) -> None:
    made = vocab.plan(untied, vocab_config(max_size=512), make_context(untied))
    cut = vocab.apply(untied, made)
    assert len(made.keep) == cut.spec.vocab_size == 512
    old, new = library(untied.tokenizer), library(cut.tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert cut.weights[name].shape == (512, untied.spec.hidden_size)
        for index in range(512):
            before = old.token_to_id(str(new.id_to_token(index)))
            assert torch.equal(cut.weights[name][index], untied.weights[name][before])


def test_ids_keep_their_order(untied: CausalLM, make_context: MakeContext) -> None:
    cut = vocab.apply(untied, vocab.plan(untied, vocab_config(max_size=512), make_context(untied)))
    old, new = library(untied.tokenizer), library(cut.tokenizer)
    before = [old.token_to_id(str(new.id_to_token(index))) for index in range(512)]
    assert before == sorted(before)


def test_the_growth_told_is_the_growth_measured(tied: CausalLM, make_context: MakeContext) -> None:
    context = make_context(tied)
    made = vocab.plan(tied, vocab_config(max_size=448), context)
    old, new = library(tied.tokenizer), library(vocab.apply(tied, made).tokenizer)

    def length(tokenizer: Tokenizer) -> int:
        return sum(len(tokenizer.encode(d.text, add_special_tokens=False).ids) for d in context.heldout)

    assert length(new) > length(old)
    assert made.details["heldout_token_inflation"]["code"] == pytest.approx(length(new) / length(old), abs=1e-5)
    assert set(made.details["heldout_token_inflation"]) == {"code", "english", "other languages"}


def test_the_mass_told_is_what_transformers_gives_to_the_tokens_removed(
    any_tiny: Path, make_context: MakeContext
) -> None:
    model = load.load(str(any_tiny))
    context = make_context(model)
    made = vocab.plan(model, vocab_config(max_size=448), context)
    theirs = transformers_model(str(any_tiny))
    tokens = windows(vocab.encoder(model.tokenizer), context.heldout)
    assert tokens.shape == (4, 256)
    with torch.no_grad():
        likely = theirs(tokens).logits[:, :-1].softmax(-1)
    gone = sorted(set(range(model.spec.vocab_size)) - set(made.keep))
    assert made.details["removed_mass"] == pytest.approx(float(likely[..., gone].sum(-1).mean()), rel=1e-3)


def test_which_row_was_which_is_written(untied: CausalLM, make_context: MakeContext, tmp_path: Path) -> None:
    made = vocab.plan(untied, vocab_config(max_size=512), make_context(untied))
    checkpoint.write(vocab.apply(untied, made), tmp_path)
    assert checkpoint.read_vocab_map(tmp_path) == made.keep


def test_a_tokenizer_that_loses_text_is_caught(
    tied: CausalLM, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BytePairs, "symbols", frozenset())
    with pytest.raises(StageError, match=r"does not give .* back"):
        vocab.plan(tied, vocab_config(coverage=0.3, multiple_of=1), make_context(tied))


def cut_of(model: CausalLM, more: Iterable[int] = ()) -> tuple[CausalLM, tuple[int, ...]]:
    """The smallest cut, with some more ids; and the old id of each new one."""
    pairs = BytePairs.of(model.tokenizer.tokenizer)
    keep = tuple(sorted(least_kept(model) | pairs.closure(more)))
    return vocab.apply(model, vocab.VocabPlan("", {}, keep)), keep


def test_added_tokens_and_the_post_processor_are_renumbered(padded: CausalLM) -> None:
    cut, keep = cut_of(padded)
    old, new = library(padded.tokenizer), library(cut.tokenizer)
    text = "<tool>a<|fim|>b<|im_end|>"
    before, after = old.encode(text), new.encode(text)
    assert before.tokens[0] == "<|im_start|>"  # the post-processor's
    assert before.tokens[-1] == "<|fim|>"
    assert after.tokens == before.tokens
    assert [keep[index] for index in after.ids] == before.ids
    for entry in cut.tokenizer.tokenizer["added_tokens"]:
        assert new.token_to_id(entry["content"]) == entry["id"]


def test_the_padding_of_the_file_pads_with_the_same_token(padded: CausalLM) -> None:
    cut, _ = cut_of(padded)
    short, _ = library(cut.tokenizer).encode_batch(["a", "aaaaaaaaaa"], add_special_tokens=False)
    old_short, _ = library(padded.tokenizer).encode_batch(["a", "aaaaaaaaaa"], add_special_tokens=False)
    assert short.tokens[-1] == old_short.tokens[-1] == "<|fim|>"
    assert short.ids[-1] == library(cut.tokenizer).token_to_id("<|fim|>")


@pytest.mark.parametrize("kind", ["BertProcessing", "RobertaProcessing", "Sequence"])
def test_every_kind_of_post_processor_is_renumbered(byte_level: TokenizerFiles, kind: str) -> None:
    content = copy.deepcopy(dict(byte_level.tokenizer))
    pair = {"sep": ["<|im_end|>", 2], "cls": ["<|endoftext|>", 0]}
    more = {"trim_offsets": True, "add_prefix_space": False}
    bert = {"type": "RobertaProcessing", **pair, **more} if kind != "BertProcessing" else {"type": kind, **pair}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content["post_processor"] = {"type": kind, "processors": [byte, bert]} if kind == "Sequence" else bert
    files = replace(byte_level, tokenizer=content)
    keep = [0, 2, *sorted(BytePairs.of(content).symbols)]
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] in keep]
    ids = library(vocab.remap_tokenizer(files, keep)).encode("a").ids
    assert [keep[index] for index in ids] == library(files).encode("a").ids


def test_token_ids_in_configs_are_renumbered_and_nothing_else(padded: CausalLM) -> None:
    cut, _ = cut_of(padded)
    old, new = library(padded.tokenizer), library(cut.tokenizer)

    def names(tokenizer: Tokenizer, ids: Any) -> Any:
        return [names(tokenizer, item) for item in ids] if isinstance(ids, list) else tokenizer.id_to_token(ids)

    assert cut.generation_config["eos_token_id"] != padded.generation_config["eos_token_id"]
    for key in ("eos_token_id", "suppress_tokens", "bad_words_ids"):
        assert names(new, cut.generation_config[key]) == names(old, padded.generation_config[key])
    assert names(new, cut.config["pad_token_id"]) == "<|fim|>"
    assert cut.generation_config["max_length"] == 2
    assert cut.config["num_attention_heads"] == padded.config["num_attention_heads"]


def test_the_table_that_transformers_4_wrote_is_renumbered(byte_level: TokenizerFiles) -> None:
    table = {"2": {"content": "<|im_end|>"}}
    files = replace(byte_level, config={**byte_level.config, "added_tokens_decoder": table})
    content = {**byte_level.tokenizer, "added_tokens": byte_level.tokenizer["added_tokens"][2:]}
    keep = [2, *sorted(BytePairs.of(content).symbols)]
    remapped = vocab.remap_tokenizer(replace(files, tokenizer=content), keep)
    assert remapped.config["added_tokens_decoder"] == {"0": {"content": "<|im_end|>"}}


def conversations() -> list[tuple[list[dict[str, str]], list[Any] | None]]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "z"}, {"role": "user", "content": "q"}]
    return [(turns, None), ([{"role": "system", "content": "q"}, *turns], None), (turns, [TOOL])]


def chat_ids(folder: Path) -> list[list[int]]:
    """What transformers makes of some conversations, as token ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=prompt)["input_ids"]
        for messages, tools in conversations()
        for prompt in (False, True)
    ]


def test_chat_prompts_are_tokenised_as_before(any_tiny: Path, tmp_path: Path) -> None:
    dense = load.load(str(any_tiny))
    cut, keep = cut_of(dense)
    assert len(keep) < dense.spec.vocab_size
    checkpoint.write_tokenizer(cut, tmp_path)
    checkpoint._write_json(tmp_path / "config.json", {**cut.config, "vocab_size": len(keep)})
    before, after = chat_ids(any_tiny), chat_ids(tmp_path)
    assert [[keep[index] for index in ids] for ids in after] == before


def test_what_only_a_template_says_is_kept(tied: CausalLM) -> None:
    word = next(token for token in ("return", "import", "class") if library(tied.tokenizer).token_to_id(token))
    index = library(tied.tokenizer).token_to_id(word)
    quiet = vocab.must_keep(tied, library(tied.tokenizer))
    speaking = replace(tied.tokenizer, chat_template="{{ raise_exception('no') if tools else '" + word + "' }}")
    found = vocab.must_keep(replace(tied, tokenizer=speaking), library(tied.tokenizer))
    assert index not in quiet
    assert index in found


def test_special_tokens_and_the_unknown_token_are_kept(padded: CausalLM) -> None:
    content = copy.deepcopy(dict(padded.tokenizer.tokenizer))
    content["model"]["unk_token"] = content["model"]["merges"][-1][0] + content["model"]["merges"][-1][1]
    files = replace(padded.tokenizer, tokenizer=content, chat_template=None)
    unknown = library(files).token_to_id(content["model"]["unk_token"])
    assert vocab.must_keep(replace(padded, tokenizer=files), library(files)) == {0, 1, 2, 700, 701, unknown}


@pytest.mark.chain
def test_a_real_tokenizer_keeps_its_tokens_reachable(smollm: CausalLM, texts: tuple[str, ...]) -> None:
    pairs = BytePairs.of(smollm.tokenizer.tokenizer)
    dense = library(smollm.tokenizer)
    seen = {index for text in texts for index in dense.encode(text, add_special_tokens=False).ids}

    def unreachable(kept: set[int]) -> int:
        tokens = {token: index for token, index in pairs.vocab.items() if index in kept}
        judge = Tokenizer(models.BPE(vocab=tokens, merges=pairs.surviving_merges(kept)))
        special = {entry["id"] for entry in smollm.tokenizer.tokenizer["added_tokens"]}
        made = {index for token, index in tokens.items() if judge.encode(token).ids == [index]}
        return len(set(tokens.values()) - made - special)

    assert unreachable(seen | pairs.symbols) > 0.1 * len(seen)
    assert unreachable(pairs.closure(seen) | pairs.symbols) == 0


def test_corpora_weigh_alike_however_long_they_are(tied: CausalLM) -> None:
    tokenizer = vocab.encoder(tied.tokenizer)
    few, many = Document("a", "return", "few"), Document("b", "import " * 500, "many")
    counts = vocab.count_tokens(tokenizer, [few, many], tied.spec.vocab_size)
    shares = vocab.balanced(counts)
    for corpus, seen in counts.items():
        assert shares[seen > 0].sum() >= 1, corpus
    assert vocab.balanced({"few": counts["few"]}) is counts["few"]
