"""``flabc recover``: from a checkpoint to a checkpoint, and from a killed run to the same end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from flabc import api, recovering
from flabc.artifact import Artifact
from flabc.cli import cli
from flabc.compress import checkpoint, devices, load, recover
from flabc.compress.config import Recovery
from flabc.compress.model import cut_layers
from flabc.errors import MissingExtraError, ModelError, RecoveryError, UsageError

from .conftest import write_tiny

OPTIONS = ("--batch", "4", "--max-steps", "24", "--epochs", "20", "--evaluations", "6", "--max-length", "96")
HOW = (*OPTIONS, "--learning-rate", "5e-3", "--patience", "9")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions that are easy to learn, on all three sides."""
    file = tmp_path_factory.mktemp("tasks") / "tasks.jsonl"
    rows = [
        {
            "task_id": f"t/{n}",
            "prompt": f'def add_{n}(value):\n    """Add {n} to value."""\n',
            "canonical_solution": f"    return value + {n}\n",
            "split": ("dev", "test", "train", "train", "train")[n % 5],
        }
        for n in range(60)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def command(pruned: Path, tasks: Path, out: Path, *more: str) -> list[str]:
    return ["recover", str(pruned), "--data", str(tasks), "-o", str(out), *HOW, *more]


def test_a_recovered_checkpoint_is_one_and_says_how_it_came_to_be(
    tiny_checkpoint: Path, tiny: object, tasks: Path, tmp_path: Path
) -> None:
    """LoRA after the dense model, in a cut vocabulary; the result is opened by transformers."""
    out, dense = tmp_path / "out", tiny("qwen2-tied")  # type: ignore[operator]
    asked = command(tiny_checkpoint, tasks, out, "--teacher", str(dense), "--json", "--packing")
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["before"]["kl"] > 0
    assert (found["examples"], found["dev_examples"]) == (36, 12)
    before, after = Artifact.open(tiny_checkpoint).manifest, Artifact.open(out, "checkpoint").manifest
    (receipt,) = after.receipts["recovery"]
    assert receipt["data"] == found["data"]
    assert receipt["after"] == found["after"]
    assert receipt["options"]["rank"] == 16
    fastest = devices.compute_dtype(torch.device("cpu"))
    assert getattr(torch, receipt["options"]["dtype"]) == fastest  # what "auto" came to here
    card = (out / "README.md").read_text()
    assert card.startswith((tiny_checkpoint / "README.md").read_text().rstrip("\n"))
    assert f"| cross-entropy | {found['before']['ce']:.4f} | {found['after']['ce']:.4f} |" in card
    assert after.receipts["stages"] == before.receipts["stages"]
    assert (after.spec, after.recipe, after.source) == (before.spec, before.recipe, before.source)
    assert checkpoint.read_vocab_map(out) == checkpoint.read_vocab_map(tiny_checkpoint)
    assert not Path(f"{out}.partial").exists()
    from transformers import AutoModelForCausalLM

    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny_checkpoint, out))
    assert new.dtype == old.dtype
    changed = [name for name, tensor in new.state_dict().items() if not torch.equal(tensor, old.state_dict()[name])]
    assert any("q_proj" in name for name in changed)
    assert not any("norm" in name or "embed" in name for name in changed)  # adapters stand beside matrices only


def test_hidden_states_are_those_of_the_model_that_was_cut(
    tiny_checkpoint: Path,
    tiny: Callable[[str], Path],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of three layers is gone: which stayed is known, and a model of two layers is refused as a teacher."""
    said = Artifact.open(tiny_checkpoint).manifest.receipts["layers"]
    assert len(set(said["kept"]) & {0, 1, 2}) == 2
    assert said["of"] == 3
    asked, own = list[list[int]](), recover.as_teacher

    def spied(model: object, ids: Sequence[int], layers: Sequence[int], device: str) -> recover.Teacher:
        asked.append(list(layers))
        return own(model, ids, layers, device)

    monkeypatch.setattr(recover, "as_teacher", spied)
    dense = str(tiny("qwen2-tied"))
    options = Recovery(hidden_weight=0.5, max_steps=4, batch=2, evaluations=2, dtype="float32")
    done = recovering.recover(tiny_checkpoint, tmp_path / "out", data=tasks, teacher=dense, options=options)
    assert (done.before["hidden"] or 0) > 0
    assert "| distance of hidden states, a share |" in (tmp_path / "out" / "README.md").read_text()
    assert asked == [said["kept"]]
    assert Artifact.open(tmp_path / "out").manifest.receipts["layers"] == said
    with pytest.raises(ModelError, match=r"Expected: 3 layers of hidden size 48\. Found: 2 of 48"):
        recovering.recover(tiny_checkpoint, tmp_path / "x", data=tasks, teacher=str(tiny_checkpoint), options=options)


def test_the_layers_that_stayed_are_the_first_models_through_several_cuts(
    tiny_checkpoint: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    kept = Artifact.open(tiny_checkpoint).manifest.receipts["layers"]["kept"]
    once = load.load(str(tiny_checkpoint))
    assert api._layers(str(tiny_checkpoint), cut_layers(once, [1]), once) == {"kept": [kept[1]], "of": 3}
    dense = load.load(str(tiny("qwen2-tied")))
    assert api._layers(str(tiny("qwen2-tied")), cut_layers(dense, [1, 2]), dense) == {"kept": [1, 2], "of": 3}
    older = shutil.copytree(tiny_checkpoint, tmp_path / "older")
    manifest = json.loads((older / "flabc.json").read_text())
    del manifest["receipts"]["layers"]
    (older / "flabc.json").write_text(json.dumps(manifest))
    assert api._layers(str(older), once, once) is None
    with pytest.raises(ModelError, match="does not say which layers of the dense model it kept"):
        recovering._teachers_layers(Artifact.open(older), once.spec, dense.spec)
    wide = dense.spec.model_copy(update={"hidden_size": 96})
    with pytest.raises(ModelError, match=r"Expected: 3 layers of hidden size 48\. Found: 3 of 96"):
        recovering._teachers_layers(Artifact.open(tiny_checkpoint), once.spec, wide)


def test_text_is_learnt_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"number {number} is followed by {number + 1}\n" * 20)
    options = Recovery(method="full", batch=2, max_steps=6, evaluations=2, max_length=64, learning_rate=1e-3)
    done = recovering.recover(tiny_checkpoint, tmp_path / "out", text=str(folder), options=options)
    assert done.after["ce"] < done.before["ce"]  # type: ignore[operator]
    assert done.after["kl"] is None


def test_conversations_are_learnt_by_the_models_template(tiny_checkpoint: Path, tasks: Path) -> None:
    from flabc.compress.stage import encoder

    model = load.load(str(tiny_checkpoint))
    train, _ = recovering._examples(model, tasks, None, Recovery(chat=True))
    tokenizer = encoder(model.tokenizer)
    given, learnt = train[0].ids[: train[0].given], train[0].ids[train[0].given :]
    text = tokenizer.decode(given, skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\nComplete this Python function.")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(learnt, skip_special_tokens=False).startswith("```python\ndef add_2(value):")
    assert tokenizer.decode(learnt, skip_special_tokens=False).endswith("    return value + 2\n```<|im_end|>")


def run_until(arguments: list[str], there: Path) -> None:
    """Start the command in a process of its own, and kill it as soon as a file is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = "import sys; from flabc.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment) as process:
        until = time.monotonic() + 240
        while not there.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def run(arguments: list[str]) -> dict[str, object]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = "import sys; from flabc.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_a_killed_run_goes_on_to_the_same_weights(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    states = Path(f"{broken}.partial") / "states"
    unbroken = run(command(tiny_checkpoint, tasks, whole, "--json"))
    asked = command(tiny_checkpoint, tasks, broken, "--json")
    run_until(asked, states / "checkpoint-8" / "trainer_state.json")
    assert not broken.exists()
    with pytest.raises(UsageError, match="--resume goes on"):
        recovering.recover(tiny_checkpoint, broken, data=tasks)
    resumed = run([*asked, "--resume"])
    for key in ("before", "after", "steps", "best_step", "tokens"):
        assert resumed[key] == unbroken[key], key
    curves = [
        [{key: row[key] for key in ("step", "loss", "eval_loss") if key in row} for row in done["curve"]]  # type: ignore[attr-defined]
        for done in (unbroken, resumed)
    ]
    assert curves[0] == curves[1]
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_calls_that_do_not_fit_are_refused(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="nothing to train on"):
        recovering.recover(tiny_checkpoint, out)
    with pytest.raises(UsageError, match="Distillation follows a teacher"):
        recovering.recover(tiny_checkpoint, tmp_path / "x", data=tasks, options=Recovery(hidden_weight=1))
    with pytest.raises(UsageError, match="Distillation follows a teacher"):
        recovering.recover(tiny_checkpoint, out, data=tasks, options=Recovery(method="distill"))
    with pytest.raises(UsageError, match="no run to go on with"):
        recovering.recover(tiny_checkpoint, out, data=tasks, resume=True)
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps({"prompt": "a", "solution": "b", "split": "dev"}) + "\n")
    with pytest.raises(RecoveryError, match="Found: 0 and 1"):
        recovering.recover(tiny_checkpoint, out, data=few)
    assert not out.exists()


def test_a_teachers_ids_are_those_of_the_same_tokens_however_often_it_was_cut(
    tiny_checkpoint: Path, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """The map in a folder is of the model that it was cut from last; a cut of a cut has a map of its own, or none."""
    dense = tiny("qwen2-tied")
    expected = checkpoint.read_vocab_map(tiny_checkpoint)
    assert expected is not None
    again = tmp_path / "again"
    again.mkdir()
    once = load.load(str(tiny_checkpoint))
    checkpoint.write(cut_layers(once, [0]), again)
    assert checkpoint.read_vocab_map(again) is None
    assert recovering._teachers_ids(again, dense, range(once.spec.vocab_size)) == list(expected)
    other = write_tiny(tmp_path / "other", "qwen2-tied")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|another|>"))
    with pytest.raises(ModelError, match=r"not the model that this one was cut from.*other tokens.*--teacher"):
        recovering._teachers_ids(again, other, range(once.spec.vocab_size))


def test_two_processes_come_to_what_one_comes_to(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    """By accelerate's own launcher, on the processor, over gloo: two batches of two are one batch of four."""
    one, two = tmp_path / "one", tmp_path / "two"
    how = ["--method", "full", "--epochs", "1", "--evaluations", "3", "--max-length", "96", "--learning-rate", "1e-3"]
    how += ["--dtype", "float32"]  # in bfloat16 the order of sums is seen
    asked = ["recover", str(tiny_checkpoint), "--data", str(tasks), "--json", *how]
    alone = run([*asked, "-o", str(one), "--batch", "4"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    ours = f"--dynamo_backend no --main_process_port {port} -m flabc"
    done = subprocess.run(
        [sys.executable, *launcher.split(), *ours.split(), *asked, "-o", str(two), "--batch", "2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads(done.stdout)  # one of them tells
    assert (together["processes"], alone["processes"]) == (2, 1)
    assert (together["steps"], together["best_step"]) == (alone["steps"], alone["best_step"])
    assert together["before"]["loss"] == pytest.approx(alone["before"]["loss"], rel=1e-6)  # type: ignore[index]
    assert together["after"]["loss"] == pytest.approx(alone["after"]["loss"], rel=1e-4)  # type: ignore[index]
    assert together["after"]["loss"] < together["before"]["loss"]
    Artifact.open(two, "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    start, first, second = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, one, two))
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert apart < moved / 50


def test_processes_that_share_weights_are_refused(
    tiny_checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecoveryError, match="share the weights"):
        recovering.recover(tiny_checkpoint, tmp_path / "out", data=tasks)


def test_logs_for_tensorboard(tiny_checkpoint: Path, tasks: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    asked = command(tiny_checkpoint, tasks, tmp_path / "out", "--tensorboard", str(tmp_path / "logs"), "--json")
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    found = events.EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    told = {event.step: event.value for event in found.Scalars("eval/loss")}
    curve = {row["step"]: row["eval_loss"] for row in json.loads(done.stdout)["curve"] if "eval_loss" in row}
    assert told == pytest.approx(curve)


def test_logs_need_the_package(
    tiny_checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"flabc\[tensorboard\]"):
        recovering.recover(tiny_checkpoint, tmp_path / "out", data=tasks, tensorboard=tmp_path / "logs")
    assert not list(tmp_path.iterdir())
