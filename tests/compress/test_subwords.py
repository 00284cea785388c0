"""The guarantees of a cut vocabulary, for every kind of tokenizer, judged by the tokenizers library.

The tokenizers are made as their originals were: by SentencePiece, and read by transformers; or by the tokenizers
library's own trainers.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from flabc.compress import checkpoint, load, vocab
from flabc.compress.bpe import BytePairs
from flabc.compress.config import VocabConfig
from flabc.compress.data import corpus
from flabc.compress.data.prose import samples
from flabc.compress.location import Location
from flabc.compress.model import CausalLM, TokenizerFiles
from flabc.compress.stage import Context, encoder
from flabc.compress.subwords import Subwords
from flabc.compress.unigram import Unigram
from flabc.compress.vocab import remap_tokenizer, subwords_of
from flabc.errors import StageError

fast = settings(max_examples=25, deadline=None)
SIZE = 900


@functools.cache
def code() -> tuple[str, ...]:
    """A little Python text."""
    return tuple(document.text for document in corpus.load("python-stdlib", "calibration")[:40])


@functools.cache
def lines() -> tuple[str, ...]:
    """Code, and prose in three languages; the others' letters stay unknown."""
    english, others = samples()
    prose = [d.text for d in others if d.name in ("german", "french")] + [english.text]
    return (*[line for text in code() for line in text.splitlines() if line][:5000], *prose)


def sentence_piece(folder: Path, name: str, tokenizer_class: str, **options: Any) -> TokenizerFiles:
    """A model trained by SentencePiece, read by transformers as the folders of its family are."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = BytesIO()
    trainer.train(
        sentence_iterator=iter(lines()), model_writer=model, vocab_size=SIZE, minloglevel=2, num_threads=1, **options
    )
    (folder / name).write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    return load.read_tokenizer(Location(name, folder))


#: What Llama 2 and Gemma were trained with.
AS_IS: dict[str, Any] = {
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.999,
}


def llama2(folder: Path) -> TokenizerFiles:
    return sentence_piece(folder, "tokenizer.model", "LlamaTokenizer", model_type="bpe", **AS_IS)


def gemma(folder: Path) -> TokenizerFiles:
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    return sentence_piece(folder, "tokenizer.model", "GemmaTokenizer", model_type="bpe", **ids, **AS_IS)


def gemma_with_tab(folder: Path) -> TokenizerFiles:
    """As transformers 4 converted Gemma: the tab takes the place of its byte, so that nothing could spell it."""
    files = gemma(folder)
    vocab = dict(files.tokenizer["model"]["vocab"])
    vocab["\t"] = vocab.pop("<0x09>")
    return TokenizerFiles(files.tokenizer | {"model": files.tokenizer["model"] | {"vocab": vocab}}, files.config)


def t5(folder: Path) -> TokenizerFiles:
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": -1, "unk_id": 2, "character_coverage": 0.999}
    return sentence_piece(folder, "spiece.model", "T5Tokenizer", model_type="unigram", **ids)


def metaspace(trainer: Any, model: Any, *, is_unigram: bool = False) -> TokenizerFiles:
    """Trained by the tokenizers library, laid out as Llama 2 was by transformers 4: normalizer, no pre-tokenizer."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    content["model"]["byte_fallback"] = True  # the trainer of Unigram forgets it
    return TokenizerFiles(content, {})


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained_bpe(_: Path) -> TokenizerFiles:
    options = {"vocab_size": SIZE, "special_tokens": ["<unk>", "<s>", "</s>", *BYTES], "show_progress": False}
    files = metaspace(trainers.BpeTrainer(**options), models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    files.tokenizer["added_tokens"][3:] = []  # bytes are ordinary tokens of the vocabulary
    return files


def trained_unigram(_: Path) -> TokenizerFiles:
    options = {"vocab_size": SIZE, "special_tokens": ["<unk>", "<s>", "</s>", *BYTES], "show_progress": False}
    files = metaspace(trainers.UnigramTrainer(unk_token="<unk>", **options), models.Unigram(byte_fallback=True))
    files.tokenizer["added_tokens"][3:] = []
    return files


def gpt2(_: Path) -> TokenizerFiles:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(code(), trainers.BpeTrainer(vocab_size=SIZE, special_tokens=special, **options))
    return TokenizerFiles(json.loads(tokenizer.to_str()), {})


def llama3(folder: Path) -> TokenizerFiles:
    """Merges are ignored for whole words; as in the original, some words have no merges that make them."""
    files = gpt2(folder)
    model = files.tokenizer["model"] | {"ignore_merges": True}
    model["merges"] = [pair for at, pair in enumerate(model["merges"]) if at < 200 or at % 7]
    made = {left + right for left, right in model["merges"]}
    dangling = [pair for pair in model["merges"] if not all(len(part) == 1 or part in made for part in pair)]
    assert dangling
    return TokenizerFiles(files.tokenizer | {"model": model}, {})


#: Every kind of tokenizer, as it is made.
KINDS: dict[str, Callable[[Path], TokenizerFiles]] = {
    "gpt2": gpt2,
    "llama3": llama3,
    "llama2": llama2,
    "gemma": gemma,
    "gemma-with-tab": gemma_with_tab,
    "t5": t5,
    "trained-bpe": trained_bpe,
    "trained-unigram": trained_unigram,
}


class Subject:
    """A tokenizer, what it is made of, and its cuts."""

    def __init__(self, files: TokenizerFiles) -> None:
        self.files = files
        self.subwords: Subwords = subwords_of(files.tokenizer)
        self.dense = Tokenizer.from_str(json.dumps(files.tokenizer))
        self.size = self.dense.get_vocab_size()
        added = {entry["id"] for entry in files.tokenizer["added_tokens"]}
        self.fixed = self.subwords.closure(added | self.subwords.symbols)

    def cut(self, wanted: Iterable[int]) -> tuple[Tokenizer, list[int]]:
        """The tokenizer over these tokens and what must stay; and the old id of each new one."""
        keep = sorted(self.fixed | self.subwords.closure(wanted))
        pruned = remap_tokenizer(self.files, keep)
        return Tokenizer.from_str(json.dumps(pruned.tokenizer)), keep


@pytest.fixture(scope="module", params=list(KINDS))
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(KINDS[request.param](tmp_path_factory.mktemp(request.param)))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Code, prose, spaces, marks that tokenizers use themselves, and anything else."""
    english, others = samples()
    source = draw(st.sampled_from([*code()[:10], *(d.text for d in [english, *others])]))
    start = draw(st.integers(0, len(source) - 1))
    words = st.sampled_from(["  ", "\t", "\n\n", "▁", "<0x41>", "<0x", "é", "中", "<unk>", "\r\n"])
    parts = [st.just(source[start : start + draw(st.integers(1, 80))]), words, st.text(max_size=12)]
    return "".join(draw(st.lists(st.one_of(parts), min_size=1, max_size=4)))


def wanted_of(subject: Subject, seed: int, count: int) -> list[int]:
    return random.Random(seed).sample(range(subject.size), count)


some = st.tuples(st.integers(0, 2**32), st.integers(0, 200))


@fast
@given(text=st.one_of(texts(), st.binary(max_size=60).map(lambda data: data.decode("utf-8", "replace"))), seed=some)
def test_every_text_survives(subject: Subject, text: str, seed: tuple[int, int]) -> None:
    pruned, _ = subject.cut(wanted_of(subject, *seed))
    if not is_spelled(subject, text):  # without byte fallback a character that is no piece is lost, dense or not
        assume(False)
    before, after = encode(subject.dense, text), encode(pruned, text)
    assert pruned.decode(after, skip_special_tokens=False) == subject.dense.decode(before, skip_special_tokens=False)


def is_spelled(subject: Subject, text: str) -> bool:
    """Whether every character of a text is a piece, or bytes stand for it."""
    model = subject.files.tokenizer["model"]
    if model["type"] == "BPE" or model["byte_fallback"]:
        return True
    normal = subject.dense.normalizer.normalize_str(text).replace(" ", "▁")
    return set(normal) <= {piece for piece, _ in model["vocab"]}


@fast
@given(text=texts(), seed=some)
def test_a_text_whose_tokens_are_all_kept_is_tokenised_as_before(
    subject: Subject, text: str, seed: tuple[int, int]
) -> None:
    before = encode(subject.dense, text)
    pruned, keep = subject.cut([*wanted_of(subject, *seed), *before])
    assert [keep[new] for new in encode(pruned, text)] == before


@settings(max_examples=8, deadline=None)
@given(seed=some)
def test_no_kept_token_becomes_unreachable(subject: Subject, seed: tuple[int, int]) -> None:
    pruned, keep = subject.cut(wanted_of(subject, *seed))
    for tokenizer in (dense := bare(subject.dense), pruned := bare(pruned)):
        assert tokenizer.normalizer is None
    for new, old in enumerate(keep):
        token = str(subject.dense.id_to_token(old))
        if encode(dense, token) == [old]:
            assert encode(pruned, token) == [new], token


def bare(tokenizer: Tokenizer) -> Tokenizer:
    """The model alone: no normalizer, pre-tokenizer or added tokens."""
    content = json.loads(tokenizer.to_str())
    empty = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return Tokenizer.from_str(json.dumps(content | empty | {"added_tokens": []}))


@fast
@given(seed=some, data=st.data())
def test_sizes_are_hit_and_sets_stay_closed(subject: Subject, seed: tuple[int, int], data: Any) -> None:
    subwords = subject.subwords
    kept = subject.fixed | subwords.closure(wanted_of(subject, *seed))
    size = data.draw(st.integers(len(subject.fixed), subject.size))
    counts = {index: index * 7919 % 13 for index in kept}
    resized = subwords.shrink(kept, subject.fixed, counts, size) if size < len(kept) else subwords.grow(kept, size)
    assert len(resized) == size
    assert subject.fixed <= resized
    assert subwords.closure(resized) == resized


def test_every_byte_stays(subject: Subject) -> None:
    vocab = subject.dense.get_vocab()
    if "<0x41>" in vocab:
        assert {vocab[byte] for byte in BYTES if byte in vocab} <= subject.subwords.symbols
        # A character that bytes can spell may go.
        assert vocab["g"] not in subject.subwords.symbols
        assert vocab["▁"] in subject.subwords.symbols
        assert vocab.get("\t", vocab.get("<0x09>")) in subject.subwords.symbols


def test_whole_words_need_their_merges_too(tmp_path: Path) -> None:
    """A word that Llama 3 takes whole is, inside a longer one, still made by merges."""
    subject = Subject(llama3(tmp_path))
    pairs = BytePairs.of(subject.files.tokenizer)
    whole = {index for token, index in pairs.vocab.items() if len(token) > 2 and not pairs.needs(index)}
    assert whole - {0, 1, 2}  # reachable only as whole words
    assert any(len(pairs.needs(index)) > 3 for index in pairs.vocab.values())
    lost = next(index for index in whole if index > 2)
    pruned, keep = subject.cut([])
    assert lost not in keep
    assert pruned.decode(encode(pruned, subject.dense.decode([lost]))) == subject.dense.decode([lost])


@pytest.mark.parametrize("kind", ["llama2", "gemma", "t5"])
def test_a_cut_model_is_one_that_transformers_reads(
    kind: str, tiny: Callable[[str], Path], make_context: Callable[..., Context], tmp_path: Path
) -> None:
    """The whole stage, judged by transformers: the same text, the same rows, and a map back to the old ones."""
    from transformers import AutoTokenizer

    (tmp_path / "made").mkdir()
    model = with_tokenizer(load.load(str(tiny("llama-tied"))), KINDS[kind](tmp_path / "made"))
    config = VocabConfig.model_validate({"max_size": 576})
    plan = vocab.plan(model, config, make_context(model))
    cut = vocab.apply(model, plan)
    assert cut.spec.vocab_size == plan.details["rows"] == 576
    assert 0 < plan.details["removed_mass"] < 1
    assert plan.details["heldout_token_inflation"]["other languages"] >= 1
    (tmp_path / "cut").mkdir()
    checkpoint.write(cut, tmp_path / "cut")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "cut"), encoder(cut.tokenizer)
    mapped = checkpoint.read_vocab_map(tmp_path / "cut")
    assert mapped is not None
    assert mapped == plan.keep
    dense = encoder(model.tokenizer)
    for text in (code()[0][:2000], samples()[0].text):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == ours.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == dense.decode(dense.encode(text, add_special_tokens=False).ids)
        assert [dense.id_to_token(mapped[index]) for index in ids] == theirs.convert_ids_to_tokens(ids)
    read = load.load(str(tmp_path / "cut"))
    old, new = model.tensor("embedding"), read.tensor("embedding")
    assert torch.equal(new, old[list(mapped)])


def with_tokenizer(model: CausalLM, files: TokenizerFiles) -> CausalLM:
    """The model with another tokenizer, and random rows for it."""
    rows = max(Tokenizer.from_str(json.dumps(files.tokenizer)).get_vocab().values()) + 1
    random_rows = torch.randn(rows, model.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    return replace(
        model,
        spec=model.spec.model_copy(update={"vocab_size": rows}),
        config={**model.config, "vocab_size": rows},
        weights={**model.weights, "model.embed_tokens.weight": random_rows},
        tokenizer=files,
        token_origin=tuple(range(rows)),
    )


def test_what_an_unknown_character_costs_does_not_change() -> None:
    """The library prices it by the worst piece: without that, the best way to write the rest would be another."""
    scores = [("<unk>", 0.0), ("a", -2.0), ("b", -2.0), ("éa", -25.0), ("z", -30.0), ("ab", -3.0)]
    content = json.loads(Tokenizer(models.Unigram(scores, unk_id=0)).to_str())
    subwords = Unigram.of(content)
    assert subwords.symbols == {0, 1, 2, 4}
    subject = Subject(TokenizerFiles(content, {}))
    pruned, keep = subject.cut([3, 5])
    for text in ("éab", "éa", "bé", "ééa"):
        assert [keep[new] for new in encode(pruned, text)] == encode(subject.dense, text)


@st.composite
def wild_bpe(draw: st.DrawFn) -> dict[str, Any]:
    """Merges in any order: they overlap, make one token in several ways, or make tokens that are never reached."""
    vocab = {**{byte: at for at, byte in enumerate(BYTES)}, "a": 256, "b": 257}
    merges = list[tuple[str, str]]()
    for _ in range(draw(st.integers(1, 9))):
        pair = draw(st.tuples(*[st.sampled_from([token for token in vocab if not token.startswith("<")])] * 2))
        vocab.setdefault(pair[0] + pair[1], len(vocab))
        merges += [pair] if pair not in merges else []
    flags = {"byte_fallback": True, "ignore_merges": draw(st.booleans())}
    return as_file(models.BPE(vocab, draw(st.permutations(merges)), **flags))


@st.composite
def wild_unigram(draw: st.DrawFn) -> dict[str, Any]:
    """Scores that tie, in a vocabulary that lacks characters."""
    pieces = draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=12, unique=True))
    scores = [(piece, float(draw(st.integers(-9, -1)))) for piece in pieces]
    bytes_too = [(byte, -5.0) for byte in BYTES] if draw(st.booleans()) else []
    return as_file(models.Unigram([("<unk>", 0.0), *bytes_too, *scores], unk_id=0, byte_fallback=bool(bytes_too)))


def as_file(model: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return dict(json.loads(tokenizer.to_str()))


@settings(max_examples=300, deadline=None)
@given(
    content=st.one_of(wild_bpe(), wild_unigram()),
    said=st.text("abc", max_size=12),
    other=st.text("abcd", max_size=9),
    data=st.data(),
)
def test_the_guarantees_hang_on_no_training(content: dict[str, Any], said: str, other: str, data: Any) -> None:
    subject = Subject(TokenizerFiles(content, {}))
    before = encode(subject.dense, said)
    pruned, keep = subject.cut([*before, *data.draw(st.sets(st.integers(0, subject.size - 1), max_size=6))])
    assert [keep[new] for new in encode(pruned, said)] == before
    if content["model"]["byte_fallback"]:
        assert pruned.decode(encode(pruned, other)) == other
    for new, old in enumerate(keep):
        token = str(subject.dense.id_to_token(old))
        assert encode(subject.dense, token) != [old] or encode(pruned, token) == [new]


def test_bytes_that_the_decoder_does_not_read_free_no_character() -> None:
    """A file may say byte_fallback and have no decoder for it: then a character that goes would not come back."""
    vocab = {**{byte: at for at, byte in enumerate(BYTES)}, "g": 256, "gg": 257}
    content = json.loads(Tokenizer(models.BPE(vocab, [("g", "g")], byte_fallback=True)).to_str())
    assert subwords_of(content).symbols == set(range(257))


def refused(model: Any) -> str:
    with pytest.raises(StageError) as caught:
        subwords_of(json.loads(Tokenizer(model).to_str()))
    return str(caught.value)


def test_tokenizers_of_other_kinds_are_refused_by_name() -> None:
    assert "BPE or Unigram. Found: WordPiece" in refused(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    assert "Found: WordLevel" in refused(models.WordLevel({"a": 0}, unk_token="a"))
    assert "end_of_word_suffix '</w>'" in refused(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
