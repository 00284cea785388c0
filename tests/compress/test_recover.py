"""Training: the losses are torch's and transformers' own, and what is written is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from flabc.compress import checkpoint, load, recover
from flabc.compress.config import Recovery
from flabc.compress.data.examples import IGNORED, Example, collate, collate_packed, of_pairs, packed, sides
from flabc.compress.model import cut_channels, cut_heads, cut_layers, cut_sub_blocks, cut_vocab
from flabc.compress.stage import encoder
from flabc.errors import CorpusError, ModelError, RecoveryError
from flabc.runtime.evaluate.tasks import mined

PAD = 2


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def examples(count: int, size: int = 300, seed: int = 1) -> list[Example]:
    """Sequences that can be learnt: steps of one, from a random begin."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, size - 60, (count,), generator=generator).tolist()
    return [Example(tuple(range(start, start + 12 + start % 9)), 3) for start in starts]


def model_of(folder: Path) -> Any:
    return recover.open_model(folder, load.load(str(folder)).spec)


@pytest.fixture
def uneven(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint whose layers differ, and one of which has no attention."""
    model = cut_channels(load.load(str(tiny("qwen2-tied"))), {0: range(32), 2: range(48)})
    model = cut_sub_blocks(cut_heads(model, {0: [1]}), attention=[1])
    checkpoint.write(model, tmp_path)
    return tmp_path


def test_cross_entropy_is_transformers_own(tiny: Callable[[str], Path]) -> None:
    model = model_of(tiny("llama-tied"))
    batch = collate(PAD)(examples(5))
    ce, kl, tokens = recover.token_losses(model(**batch).logits, batch["labels"], None)
    assert kl is None
    assert tokens == int((batch["labels"] != IGNORED).sum())
    torch.testing.assert_close(ce / tokens, model(**batch).loss)


@pytest.mark.parametrize("family", ["qwen2-tied", "llama-untied-biased", "gemma3_text-tied"])
def test_kl_is_that_of_torch_over_the_tokens_that_were_kept(tiny: Callable[[str], Path], family: str) -> None:
    """The teacher's ids, logits and normaliser are taken here by hand, token by token."""
    dense = model_of(tiny(family))
    keep = sorted(set(range(0, 700, 2)) | {1})
    student = torch.randn(2, 9, len(keep))
    labels = torch.randint(0, len(keep), (2, 9))
    labels[:, :3], labels[1, 7:] = IGNORED, IGNORED
    inputs = {"input_ids": torch.randint(0, len(keep), (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    teacher = recover.as_teacher(model_of(tiny(family)), keep, (), "cpu")
    _, kl, tokens = recover.token_losses(student, labels, teacher.says(inputs, hidden=False)[0])
    logits = dense(torch.tensor(keep)[inputs["input_ids"]]).logits[..., keep]
    places = [(b, t - 1) for b in range(2) for t in range(1, 9) if labels[b, t] != IGNORED]
    each = [
        functional.kl_div(student[at].log_softmax(-1), logits[at].softmax(-1), reduction="sum").item() for at in places
    ]
    assert tokens == len(places) == 10
    assert kl is not None
    assert float(kl) == pytest.approx(sum(each), rel=1e-5)


def test_a_teacher_without_the_students_tokens_is_refused(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="lacks some of its tokens"):
        recover.as_teacher(model_of(tiny("qwen2-tied")), [0, 1, 7000], (), "cpu")


def test_packed_examples_do_not_see_each_other(tiny: Callable[[str], Path], uneven: Path) -> None:
    found = examples(7)
    rows = packed(found, 48)
    assert sorted(example.ids for row in rows for example in row) == sorted(example.ids for example in found)
    assert max(sum(len(example.ids) for example in row) for row in rows) <= 48
    assert len(rows) < len(found)
    for folder in (tiny("llama-tied"), uneven):
        model = model_of(folder).eval()
        sums = []
        for batch in (collate(PAD)(found), collate_packed(PAD)(rows)):
            labels = batch.pop("labels")
            sums.append(recover.token_losses(model(**batch, use_cache=False).logits, labels, None))
        assert sums[0][2] == sums[1][2]
        torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-5, atol=1e-4)


def test_prompts_are_given_and_answers_learnt(tiny: Callable[[str], Path]) -> None:
    tokenizer = encoder(load.load(str(tiny("llama-tied"))).tokenizer)
    pairs = [("def f(x):\n", "    return x\n"), ("x" * 400, "y")]
    (example,) = of_pairs(pairs, tokenizer, begin=[0], end=[2], max_length=40)
    assert tokenizer.decode(list(example.ids[1 : example.given])) == "def f(x):\n"
    learnt = [label for label in example.labels if label != IGNORED]
    assert (tokenizer.decode(learnt[:-1]), learnt[-1]) == ("    return x\n", 2)


def test_the_side_test_is_never_seen() -> None:
    rows = [{"prompt": str(n), "solution": "", "split": ("train", "dev", "test")[n % 3]} for n in range(9)]
    train, dev = sides(rows)
    assert [row["split"] for row in (*train, *dev)] == ["train"] * 3 + ["dev"] * 3
    train, dev = sides([{"prompt": str(n), "solution": ""} for n in range(200)])
    assert len(train) + len(dev) == 200
    assert 8 < len(dev) < 40
    few = [{"prompt": str(n), "solution": "", "split": "dev" if n < 2 else "train"} for n in range(200)]
    train, dev = sides(few)
    assert len(train) + len(dev) == 200
    assert {"0", "1"} < {row["prompt"] for row in dev}
    assert 8 < len(dev) < 40


def test_rows_without_a_solution_are_refused() -> None:
    with pytest.raises(CorpusError, match="Found: prompt, text"):
        mined.solution({"prompt": "a", "text": "b"})


OPTIONS = Recovery(
    batch=4, epochs=10, max_steps=12, evaluations=3, learning_rate=5e-3, rank=4, alpha=8, dtype="float32"
)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("shape", ["even", "uneven"])
def test_training_lowers_the_loss_and_the_weights_say_so(
    method: str, shape: str, tiny: Callable[[str], Path], uneven: Path, tmp_path: Path
) -> None:
    folder = uneven if shape == "uneven" else tiny("llama-untied-biased")
    options = OPTIONS.model_copy(update={"method": method})
    dev = examples(6, seed=2)
    done = recover.train(model_of(folder), None, examples(40), dev, options, tmp_path / "states", pad=PAD)
    assert done.after.loss < done.before.loss - 0.05
    assert done.steps == 12
    fresh = model_of(folder)
    assert set(done.weights) == set(fresh.state_dict())
    batch = collate(PAD)(dev)
    assert float(fresh(**batch).loss.detach()) == pytest.approx(done.before.ce, rel=1e-4)
    fresh.load_state_dict(done.weights)
    assert float(fresh(**batch).loss.detach()) == pytest.approx(done.after.ce, rel=1e-4)


def test_accumulated_batches_are_one_large_batch(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """By token, not by batch: examples are of different lengths."""
    results = []
    for batch, accumulate in ((8, 1), (2, 4)):
        options = OPTIONS.model_copy(
            update={"method": "full", "batch": batch, "accumulate": accumulate, "max_steps": 2, "learning_rate": 1e-3}
        )
        out = tmp_path / str(batch)
        done = recover.train(model_of(tiny("llama-tied")), None, examples(16), examples(4), options, out, pad=PAD)
        results.append(done)
    first, second = (done.weights["model.layers.0.mlp.up_proj.weight"] for done in results)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=2e-5)


def test_distillation_comes_near_the_teacher(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """A student with fewer layers and rows; all of the ways to save memory at once."""
    dense = load.load(str(tiny("llama-tied")))
    student = cut_layers(cut_vocab(dense, range(0, 700, 2)), [0, 2])
    (tmp_path / "student").mkdir()
    checkpoint.write(student, tmp_path / "student")
    options = OPTIONS.model_copy(
        update={"method": "distill", "gradient_checkpointing": True, "packing": True, "dtype": "bfloat16"}
    )
    dtype = torch.bfloat16
    opened = recover.open_model(tiny("llama-tied"), dense.spec, dtype)
    teacher = recover.as_teacher(opened, student.token_origin, (), "cpu")
    assert all(weight.dtype == dtype for weight in teacher.model.parameters())
    assert {buffer.dtype for buffer in teacher.model.buffers()} == {torch.float32}  # angles of positions
    out = tmp_path / "states"
    data = examples(40), examples(6, seed=2)
    done = recover.train(recover.open_model(tmp_path / "student", student.spec), teacher, *data, options, out, pad=PAD)
    assert done.before.kl is not None
    assert done.after.kl is not None
    assert done.after.kl < 0.9 * done.before.kl
    assert done.after.loss == done.after.kl  # nothing of the loss is cross-entropy


def test_hidden_states_are_compared_with_those_of_the_layers_that_stayed(tiny: Callable[[str], Path]) -> None:
    """By hand, token by token: the square of the distance over that of the teacher's state."""
    dense = load.load(str(tiny("llama-tied")))
    model, labels = model_of(tiny("llama-tied")), torch.tensor([[IGNORED, 5, 6, IGNORED, 7]])
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 9, 7]])}
    teacher = recover.as_teacher(model, range(dense.spec.vocab_size), [0, 1], "cpu")
    said = model(**inputs, output_hidden_states=True)
    log_probs, states = teacher.says(inputs, hidden=True)
    torch.testing.assert_close(log_probs, said.logits.log_softmax(-1))
    expected = [said.hidden_states[1], said.hidden_states[len(dense.spec.layers)]]  # the last stands for the last
    for mine, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    mine = [torch.randn_like(state) for state in states]
    total = sum(
        float((a[0, at] - b[0, at]).norm() ** 2 / b[0, at].norm() ** 2)
        for a, b in zip(mine, states, strict=True)
        for at in (0, 1, 3)  # the places that predict what is learnt
    )
    assert float(recover.hidden_distance(mine, states, labels)) == pytest.approx(total / 2, rel=1e-5)


def test_a_student_whose_layers_differ_follows_hidden_states(
    tiny: Callable[[str], Path], uneven: Path, tmp_path: Path
) -> None:
    dense = load.load(str(tiny("qwen2-tied")))
    teacher = recover.as_teacher(model_of(tiny("qwen2-tied")), range(dense.spec.vocab_size), (0, 1, 2), "cpu")
    options = OPTIONS.model_copy(update={"method": "full", "kl_weight": 0.25, "hidden_weight": 20.0, "max_steps": 30})
    data = examples(40), examples(6, seed=2)
    done = recover.train(model_of(uneven), teacher, *data, options, tmp_path / "states", pad=PAD)
    for found in (done.before, done.after):
        assert found.kl is not None
        assert found.hidden is not None
        assert found.loss == pytest.approx(0.75 * found.ce + 0.25 * found.kl + 20 * found.hidden, rel=1e-6)
    assert done.before.hidden is not None
    assert done.after.hidden is not None
    assert done.after.hidden < 0.9 * done.before.hidden


def test_the_best_state_is_kept_and_training_stops_early(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """What is learnt is wrong on dev: it only gets worse."""
    wrong = [Example(example.ids[:3] + example.ids[:2:-1], 3) for example in examples(6)]
    options = OPTIONS.model_copy(update={"method": "full", "max_steps": 60, "evaluations": 60, "patience": 2})
    done = recover.train(model_of(tiny("llama-tied")), None, examples(60), wrong, options, tmp_path, pad=PAD)
    dev = {row["step"]: row["eval_loss"] for row in done.curve if "eval_loss" in row}
    assert done.steps < 60
    assert done.best_step == min(dev, key=dev.__getitem__) == done.steps - 2
    assert done.after.loss == pytest.approx(dev[done.best_step], rel=1e-6)


def test_patience_outlives_a_run_that_was_cut_off(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recover.token_losses
    wrong = [Example(example.ids[:3] + example.ids[:2:-1], 3) for example in examples(6)]
    options = OPTIONS.model_copy(update={"method": "full", "max_steps": 60, "evaluations": 60, "patience": 3})

    def run(folder: str) -> recover.Trained:
        model = model_of(tiny("llama-tied"))
        return recover.train(model, None, examples(60), wrong, options, tmp_path / folder, pad=PAD)

    whole = run("whole")
    learnt = 0

    def cut_off(logits: Any, labels: Any, teacher: Any) -> Any:
        nonlocal learnt
        learnt += logits.requires_grad
        if learnt == whole.steps:  # in the midst of the last step before patience ends
            raise KeyboardInterrupt
        return own(logits, labels, teacher)

    monkeypatch.setattr(recover, "token_losses", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.setattr(recover, "token_losses", own)
    resumed = run("broken")
    assert (resumed.steps, resumed.best_step, resumed.after) == (whole.steps, whole.best_step, whole.after)
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_a_loss_that_is_no_number_stops_and_the_last_state_stays(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recover.token_losses
    calls = 0

    def breaking(logits: Any, labels: Any, teacher: Any) -> Any:
        nonlocal calls
        calls += logits.requires_grad
        ce, kl, tokens = own(logits, labels, teacher)
        return (ce * float("nan") if calls == 7 and logits.requires_grad else ce), kl, tokens

    monkeypatch.setattr(recover, "token_losses", breaking)
    with pytest.raises(RecoveryError, match=r"after step 6.*the last good state is in .*checkpoint-4.*lower"):
        recover.train(model_of(tiny("llama-tied")), None, examples(60), examples(4), OPTIONS, tmp_path, pad=PAD)
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()
