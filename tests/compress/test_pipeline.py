"""A recipe's stages in a row: receipts, errors, the split of the text, and the seed."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn import functional

from flabc import recipe
from flabc.compress import load, pipeline, recover, stage
from flabc.compress.config import Calibration, LayersConfig, RecoverConfig, Target, VocabConfig, WidthsConfig
from flabc.compress.data import corpus
from flabc.compress.data.corpus import Document
from flabc.compress.model import CausalLM, TokenizerFiles, cut_layers
from flabc.compress.stage import Plan, Stage
from flabc.errors import CorpusError, ModelError, StageError
from flabc.families import FAMILIES
from flabc.frozen import Frozen

from ..conftest import VARIANTS

STAGES = (VocabConfig(max_size=512), LayersConfig(count=1, sequences=4), WidthsConfig(multiple_of=4))
Ran = tuple[CausalLM, list[pipeline.StageReceipt], dict[str, Any]]


@pytest.fixture(scope="module")
def calibration(corpus_folder: Path) -> Calibration:
    # Four sequences and no first tokens: these would be a fifth of all.
    return Calibration(corpus=str(corpus_folder), sequences=4, sequence_length=48, first_tokens=0.0)


@pytest.fixture(scope="module")
def ran(tied: CausalLM, calibration: Calibration) -> Ran:
    return pipeline.run(tied, STAGES, target=Target(params=0.6), calibration=calibration)


def test_every_stage_leaves_a_receipt_in_order(tied: CausalLM, ran: Ran) -> None:
    model, receipts, _ = ran
    assert [receipt.stage for receipt in receipts] == ["vocab", "layers", "widths"]
    sizes = [tied.spec.num_parameters, *(receipt.parameters for receipt in receipts)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == model.spec.num_parameters
    assert all(receipt.summary.startswith(f"{receipt.stage}: ") for receipt in receipts)
    assert receipts[1].as_dict().keys() == {"stage", "summary", "parameters", "seconds", "details"}


@pytest.mark.usefixtures("one_thread")
def test_a_recipe_may_prune_recover_and_prune_again(tied: CausalLM, calibration: Calibration) -> None:
    learn = RecoverConfig(method="distill", sequences=20, max_length=48, learning_rate=3e-4, batch=2)
    cut = WidthsConfig.model_validate({"rate": 0.5, "multiple_of": 4})
    again = WidthsConfig.model_validate({"rate": 0.5, "multiple_of": 4})
    fewer = VocabConfig.model_validate({"corpus": calibration.corpus, "max_size": 512})
    adapt = learn.model_copy(update={"method": "lora", "learning_rate": 3e-3})
    first, (_, *before), _ = pipeline.run(tied, [fewer, cut], target=None, calibration=calibration)
    model, (vocab, *receipts), _ = pipeline.run(
        tied, [fewer, cut, learn, again, adapt], target=None, calibration=calibration
    )
    assert vocab.stage == "vocab"
    assert [receipt.stage for receipt in receipts] == ["widths", "recover", "widths", "recover"]
    one, two, three, four = (receipt.parameters for receipt in receipts)
    assert before[0].parameters == one == two > three == four == model.spec.num_parameters
    for receipt in (receipts[1], receipts[3]):
        assert receipt.details["after"]["kl"] < receipt.details["before"]["kl"]
        assert 0 < receipt.details["tokens"] <= 18 * 47
    context = pipeline.context_of(tied, None, calibration, "cpu", 0)
    trained, _ = pipeline.run_stages(first, [learn], context)
    assert any(not torch.equal(trained.weights[name], first.weights[name]) for name in first.spec.shapes())  # type: ignore[arg-type]
    wild = learn.model_copy(update={"method": "full", "learning_rate": 30.0})
    worse, (receipt,) = pipeline.run_stages(first, [wild], context)
    assert receipt.details["kept"] is False
    assert all(torch.equal(worse.weights[name], first.weights[name]) for name in first.spec.shapes())  # type: ignore[arg-type]
    with pytest.raises(StageError, match="recover stage's sequences"):
        pipeline.run_stages(first, [learn.model_copy(update={"sequences": 10**6})], context)


@pytest.mark.usefixtures("one_thread")
def test_training_between_cuts_follows_the_hidden_states_of_the_layers_that_stayed(
    tied: CausalLM, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, too: the dense model is opened although no KL counts."""
    asked, own = list[list[int]](), recover.as_teacher

    def spied(model: Any, ids: Any, layers: Sequence[int], device: str) -> recover.Teacher:
        asked.append(list(layers))
        return own(model, ids, layers, device)

    monkeypatch.setattr(recover, "as_teacher", spied)
    how = {"method": "lora", "kl_weight": 0.0, "hidden_weight": 50.0, "sequences": 20, "max_length": 48, "batch": 2}
    learn = RecoverConfig.model_validate({**how, "learning_rate": 3e-3})
    context = pipeline.context_of(tied, None, calibration, "cpu", 0)
    _, (receipt,) = pipeline.run_stages(cut_layers(tied, [1, 2]), [learn], context)
    assert asked == [[1, 2]]
    assert receipt.details["after"]["hidden"] < receipt.details["before"]["hidden"]
    assert "nats" not in receipt.summary


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", recipe.shipped())
def test_every_shipped_recipe_runs_on_every_family(
    tiny: Callable[[str], Path], family: str, name: str, corpus_folder: Path
) -> None:
    small = {"sequences": 8, "sequence_length": 48, "corpus": str(corpus_folder)}
    changes = [f"calibration.{field}={value}" for field, value in small.items()]
    # The FFNs of tiny models are too small a share of them to make up for half.
    wanted = recipe.load(name, [*changes, "stages.widths.multiple_of=4", "target.params=0.78"])
    dense = load.load(str(tiny(next(model for model in VARIANTS if model.split("-")[0] == family))))
    cut, receipts, _ = pipeline.run(dense, wanted.stages, target=wanted.target, calibration=wanted.calibration)
    assert wanted.target is not None
    assert cut.spec.num_parameters <= pipeline.parameters_left(wanted.target, dense.spec)
    assert [receipt.stage for receipt in receipts] == [stage.stage for stage in wanted.stages]
    assert cut.spec.is_uniform


def test_the_receipts_tell_what_became_of_the_model(ran: Ran) -> None:
    model, (vocab, layers, widths), _ = ran
    assert vocab.details["rows"] == model.spec.vocab_size == 512
    assert len(layers.details["removed"]) == 1 == layers.details["layers_before"] - len(model.spec.layers)
    assert widths.details["ffn"]["after"] == [layer.intermediate_size for layer in model.spec.layers]


def test_the_dense_model_is_left_as_it_was(tied: CausalLM, calibration: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in tied.weights.items()}
    pipeline.run(tied, STAGES, target=Target(params=0.6), calibration=calibration)
    assert tied.spec.vocab_size == 700
    assert all(torch.equal(tensor, tied.weights[name]) for name, tensor in before.items())


def fingerprint(documents: Sequence[Document]) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(d.text.encode()).digest() for d in documents)).hexdigest()


def test_the_text_that_judges_is_not_the_text_that_calibrates(ran: Ran, calibration: Calibration) -> None:
    quality = ran[2]
    assert quality["calibration"] != quality["heldout"]
    for side in ("calibration", "heldout"):
        assert quality[side] == fingerprint(corpus.load(calibration.corpus, side))  # type: ignore[arg-type]


def test_bits_per_byte_are_what_transformers_loss_says(tied: CausalLM, tiny: Any, ran: Ran, make_context: Any) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny("qwen2-tied"))
    context = make_context(tied)
    tokenizer = stage.encoder(tied.tokenizer)
    nats = size = 0.0
    for document in [d for d in context.heldout if len(d.text) > 1536][:8]:
        line, text = (tokenizer.encode(t, add_special_tokens=False).ids for t in ("\n", document.text[:1536]))
        ids = torch.tensor([[*line, *text]])
        with torch.no_grad():
            logits = theirs(ids).logits[0, :-1]
        nats += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        size += len(document.text[:1536].encode())
    assert pipeline.bits_per_byte(tied, context) == pytest.approx(nats / math.log(2) / size, abs=2e-5)
    assert set(ran[2]["heldout_bits_per_byte"]) == {"dense", "pruned"}


def test_bits_per_byte_are_a_number_even_where_all_texts_are_short(tied: CausalLM, make_context: Any) -> None:
    """Zero bits for want of a long text would look like a perfect model."""
    context = make_context(tied)
    short = replace(context, heldout=[Document("a", "def f(x):\n    return x\n")])
    assert pipeline.bits_per_byte(tied, short) > 0.5


def test_a_run_repeats_itself_and_another_seed_does_not(tied: CausalLM, calibration: Calibration) -> None:
    stages = [WidthsConfig(rate=0.5, multiple_of=4)]
    first, again, other = (
        pipeline.run(tied, stages, target=None, calibration=calibration, seed=seed)[0].weights for seed in (0, 0, 1)
    )
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([WidthsConfig()], "Stage 'widths' stopped: The widths stage does not know how much to remove."),
        ([VocabConfig(max_size=64)], "Stage 'vocab' stopped: The vocabulary cannot be cut to 64 rows."),
    ],
)
def test_a_stage_that_cannot_is_named(
    tied: CausalLM, calibration: Calibration, stages: list[Frozen], said: str
) -> None:
    with pytest.raises(StageError) as caught:
        pipeline.run(tied, stages, target=None, calibration=calibration)
    assert str(caught.value).startswith(said)
    assert caught.value.__cause__ is not None


def test_an_error_while_applying_names_the_stage_too(
    tied: CausalLM, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> CausalLM:
        raise ModelError("It broke.")

    monkeypatch.setitem(pipeline.STAGES, WidthsConfig, Stage(lambda *_: Plan("widths: nothing"), broken))
    with pytest.raises(StageError, match=r"Stage 'widths' stopped: It broke\."):
        pipeline.run(tied, [WidthsConfig(rate=0.5)], target=None, calibration=calibration)


def test_texts_that_are_too_short_are_an_error_that_says_what_to_do(tied: CausalLM, corpus_folder: Path) -> None:
    wide = Calibration.model_validate({"corpus": str(corpus_folder), "sequences": 999, "sequence_length": 64})
    with pytest.raises(StageError, match=r"Stage 'layers' stopped.*Expected: 999.*lower calibration\.sequences"):
        pipeline.run(tied, [LayersConfig(count=1)], target=None, calibration=wide)


def test_every_stage_that_a_recipe_can_name_is_there() -> None:
    from flabc.compress import config

    assert {config_class.model_fields["stage"].default for config_class in pipeline.STAGES} == set(config.STAGE_NAMES)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 12), length=st.integers(2, 100))
def test_a_window_is_text_of_one_document(
    byte_level: TokenizerFiles, texts: tuple[str, ...], seed: int, count: int, length: int
) -> None:
    tokenizer = stage.encoder(byte_level)
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    windows = stage.sequences(tokenizer, documents, count, length, seed)
    assert windows.shape == (count, length)
    assert torch.equal(windows, stage.sequences(tokenizer, documents, count, length, seed))
    whole = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    for window in windows.tolist():
        assert any(window == ids[at : at + length] for ids in whole for at in range(len(ids) - length + 1))


def test_the_seed_picks_the_windows(byte_level: TokenizerFiles, texts: tuple[str, ...]) -> None:
    documents = [Document(str(index), text) for index, text in enumerate(texts)]
    made = [stage.sequences(stage.encoder(byte_level), documents, 4, 32, seed) for seed in range(4)]
    assert len({tuple(windows.flatten().tolist()) for windows in made}) == 4


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6), turns=st.integers(1, 3))
def test_long_documents_give_more_windows_that_share_no_token(seed: int, sizes: list[int], turns: int) -> None:
    words = [f"w{at}" for at in range(sum(sizes))]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    ends = list(itertools.accumulate(sizes))
    documents = [Document(str(end), " ".join(words[end - size : end])) for size, end in zip(sizes, ends, strict=True)]
    length = 10
    once = sum(size >= length for size in sizes)
    # However windows lie, gaps of less than a window are all that they leave between them.
    count = sum((size + length - 1) // (2 * length - 1) for size in sizes)
    if not count:
        return
    drawn = stage.sequences(tokenizer, documents, count, length, seed, [[]] * turns).tolist()
    assert all(window == list(range(window[0], window[0] + length)) for window in drawn)
    assert len({token for window in drawn for token in window}) == count * length
    assert len({bisect.bisect(ends, window[0]) for window in drawn[:once]}) == once


def test_too_little_text_is_counted(byte_level: TokenizerFiles) -> None:
    documents = [Document("a", "x = 1\n" * 10), Document("b", "y")]
    with pytest.raises(CorpusError, match=r"fills \d windows of 20 tokens\. Expected: 30"):
        stage.sequences(stage.encoder(byte_level), documents, 30, 20, 0)


def test_a_target_counts_parameters_of_the_dense_model(tied: CausalLM, calibration: Calibration, ran: Ran) -> None:
    step = 4 * 3 * tied.spec.hidden_size * 2
    goal = 0.6 * tied.spec.num_parameters
    assert goal - step < ran[0].spec.num_parameters <= goal + 1


def test_a_model_can_be_cut_again(tied: CausalLM, calibration: Calibration, ran: Ran, tmp_path: Path) -> None:
    from flabc.compress import checkpoint

    checkpoint.write(ran[0], tmp_path)
    again, _, _ = pipeline.run(
        load.load(str(tmp_path)), [VocabConfig(max_size=448)], target=None, calibration=calibration
    )
    assert again.spec.vocab_size == 448
    assert len(again.spec.layers) == len(ran[0].spec.layers)


def test_a_target_that_the_stages_miss_is_told_with_the_nearest(tied: CausalLM) -> None:
    with pytest.raises(StageError, match=r"do not reach its target.*target\.params=0\.\d+"):
        pipeline.run(
            tied,
            [LayersConfig(count=1, sequences=1)],
            target=Target(params=0.3),
            calibration=Calibration(sequences=2, sequence_length=32),
        )


@pytest.mark.parametrize("variant", ["llama-tied", "llama-untied-biased", "phi3-untied"])
def test_targets_count_what_transformers_counts(tiny: Callable[[str], Path], variant: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(variant)
    spec = load.load(str(folder)).spec
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    total = theirs.num_parameters()
    inside = sum(parameter.numel() for parameter in theirs.model.layers.parameters())

    def left(**fields: Any) -> int:
        return pipeline.parameters_left(Target.model_validate(fields), spec)

    assert left(params=0.75) == round(0.75 * total)
    assert left(params=5000) == 5000
    assert left(block_params=0.6) == total - round(0.4 * inside)
    assert left(bytes="100kB") == 50_000
    assert left(bytes="100kB", precision="fp32") == 25_000


@pytest.mark.parametrize(("fields", "problem"), [({}, "give one of"), ({"params": 0.5, "bytes": 9}, "at most one of")])
def test_a_target_is_one_amount(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Target.model_validate(fields)
