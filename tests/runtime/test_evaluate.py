"""Whole evaluations on tiny models: what is kept, resumed, compared, and asked over a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flabc import api, evaluating
from flabc.errors import ArtifactError, EngineError, FlabcError, UsageError
from flabc.perf.evaluation import read_records
from flabc.runtime.evaluate import generation
from flabc.runtime.evaluate.perplexity import score_text, target_nll
from flabc.runtime.evaluate.record import Completion, Journal, Record, read
from flabc.runtime.evaluate.subject import Local, Server
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

if TYPE_CHECKING:
    from .conftest import Served

QUICK = EvalOptions(task="humaneval", limit=4, max_tokens=8, allow_code_execution=True)


def completions(folder: Path) -> list[str]:
    return [record.completion for record in read_records(folder)]


def test_both_sides_are_asked_alike_and_everything_is_kept(
    tiny_engine: Path, tiny_dense_engine: Path, tmp_path: Path
) -> None:
    out = tmp_path / "quality"
    result = api.evaluate(tiny_engine, QUICK, baseline=tiny_dense_engine, output=out)
    assert sorted(file.name for file in out.iterdir()) == [
        "baseline.jsonl", "eval.json", "flabc.json", "report.html", "report.md", "target.jsonl",
    ]  # fmt: skip
    assert api.read_evaluation(out) == result
    assert not out.with_name("quality.partial").exists()
    ours, theirs = read_records(out), read_records(out, "baseline")
    assert [record.task_id for record in ours] == [record.task_id for record in theirs]
    assert [record.prompt for record in ours] == [record.prompt for record in theirs]
    assert result.target.tokens is not None
    assert 4 <= result.target.tokens <= 32
    page = (out / "report.html").read_text(encoding="utf-8")
    for record in ours:
        assert record.task_id in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_model_is_as_good_in_torch_as_in_its_engine(tiny_engine: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = QUICK.model_copy(update={"max_tokens": 16, "limit": 8})
    for name, folder in (("engine", tiny_engine), ("torch", tiny_checkpoint)):
        api.evaluate(folder, options, output=tmp_path / name)
    assert completions(tmp_path / "engine") == completions(tmp_path / "torch")


def test_a_run_that_was_cut_off_goes_on(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api.evaluate(tiny_engine, QUICK, output=tmp_path / "whole")
    asked: list[int] = []
    original = Local.answers

    def cut_off(self: Local, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> Iterator[Any]:
        asked.append(len(prompts))
        for count, answer in enumerate(original(self, prompts, params)):
            if len(asked) == 1 and count == 2:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(Local, "answers", cut_off)
    out = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        api.evaluate(tiny_engine, QUICK, output=out)
    assert not out.exists()
    with pytest.raises(UsageError, match=r"unfinished run.*--force"):
        api.evaluate(tiny_engine, QUICK.model_copy(update={"max_tokens": 9}), output=out)
    with pytest.raises(UsageError, match="unfinished run"):  # verdicts depend on it
        api.evaluate(tiny_engine, QUICK.model_copy(update={"timeout_s": 30.0}), output=out)
    resumed = api.evaluate(tiny_engine, QUICK, output=out)
    assert asked == [4, 2]
    assert resumed.target.seconds is None
    assert completions(out) == completions(tmp_path / "whole")


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    Journal(file, Completion).append(Completion(task_id="a", text="x\ny"))
    with file.open("a") as out:
        out.write('{"task_id": "b", "te')
    journal = Journal(file, Completion)
    journal.append(Completion(task_id="c", text="z"))
    assert [row.task_id for row in read(file, Completion)] == ["a", "c"]
    file.write_text('nonsense\n{"task_id": "a", "text": ""}\n')
    with pytest.raises(ValueError):
        read(file, Completion)


def test_samples_differ_and_can_be_repeated(tiny_engine: Path, tmp_path: Path) -> None:
    options = QUICK.model_copy(update={"samples": 3, "temperature": 1.0, "limit": 2})
    for name, batch in (("a", 1), ("b", 6)):
        api.evaluate(tiny_engine, options.model_copy(update={"batch": batch}), output=tmp_path / name)
    assert completions(tmp_path / "a") == completions(tmp_path / "b")
    assert len(set(completions(tmp_path / "a"))) == 6
    other = options.model_copy(update={"seed": 1})
    api.evaluate(tiny_engine, other, output=tmp_path / "c")
    assert completions(tmp_path / "c") != completions(tmp_path / "a")


def test_diff_lists_what_was_gained_and_lost(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EvalOptions(task="output-prediction", limit=3, max_tokens=4)
    grade = generation._grade
    for name, right in (("monday", {0, 1}), ("friday", {1, 2, 3})):

        def graded(*arguments: Any, right: set[int] = right) -> list[Record]:
            records = grade(*arguments)
            return [r.model_copy(update={"score": float(n in right)}) for n, r in enumerate(records)]

        monkeypatch.setattr(generation, "_grade", graded)
        api.evaluate(tiny_engine, options, output=tmp_path / name)
    found = api.diff(tmp_path / "monday", tmp_path / "friday")
    names = [record.task_id for record in read_records(tmp_path / "monday")]
    assert (found.gained, found.lost) == ((names[2], names[3]), (names[0],))
    assert found.compared == len(names)
    api.evaluate(tiny_engine, EvalOptions(limit=2), output=tmp_path / "text")
    with pytest.raises(UsageError, match="different tasks"):
        api.diff(tmp_path / "monday", tmp_path / "text")
    with pytest.raises(UsageError, match="no graded problem"):
        api.diff(tmp_path / "text", tmp_path / "text")
    with pytest.raises(ArtifactError):
        api.diff(tmp_path / "monday", tiny_engine)


@pytest.mark.parametrize("chat", [False, True])
def test_a_server_is_asked_as_a_folder_is(tiny_engine: Path, served: Served, tmp_path: Path, chat: bool) -> None:
    options = QUICK.model_copy(update={"chat": chat, "batch": 3})
    api.evaluate(tiny_engine, options, output=tmp_path / "folder")
    result = api.evaluate(served.url, options, output=tmp_path / "server")
    assert completions(tmp_path / "server") == completions(tmp_path / "folder")
    assert result.target.parameters is None
    assert result.target.tokens == api.read_evaluation(tmp_path / "folder").target.tokens
    assert all(body["model"] == "tiny" and ("messages" in body) == chat for body in served.asked)
    assert all(len(body.get("stop") or ()) <= 4 for body in served.asked)


def test_a_server_gives_perplexity_by_echo(tiny_engine: Path, served: Served, tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n}.py").write_text(f"def f{n}(x):\n    return x + {n}\n")
    options = EvalOptions(corpus=str(tmp_path))
    texts = evaluating.heldout_texts(str(tmp_path))
    session, server = Session.open(tiny_engine), Server(served.url, options)
    for text in texts.values():
        scores = server.token_logprobs(text)
        _, tokens = score_text(session.backend, session.codec, text)
        assert len(scores) == tokens - 1  # nothing stands before the first token
        ids = np.array([session.codec.encode_plain(text)])
        assert -sum(scores) == pytest.approx(float(target_nll(session.backend.score(ids)[0, :-1], ids[0, 1:]).sum()))
    result = api.evaluate(served.url, options)
    assert result.rows[0].target.n == len(texts) > 0


def test_kl_wants_two_folders(tiny_engine: Path, tiny_dense_engine: Path, served: Served) -> None:
    with pytest.raises(UsageError, match="--baseline"):
        api.evaluate(tiny_engine, EvalOptions(task="kl"))
    with pytest.raises(UsageError, match="every logit"):
        api.evaluate(served.url, EvalOptions(task="kl", limit=1), baseline=tiny_dense_engine)
    rows = api.evaluate(tiny_engine, EvalOptions(task="kl", limit=2), baseline=tiny_dense_engine).rows
    assert [row.metric.split()[0] for row in rows] == ["KL", "same", "baseline's"]
    assert rows[0].target.value > 0


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(EngineError, match="does not answer"):
        api.evaluate("http://127.0.0.1:9", EvalOptions(limit=1))


def test_a_misspelt_model_leaves_nothing_in_the_way(tiny_engine: Path, tmp_path: Path) -> None:
    with pytest.raises(FlabcError):
        api.evaluate(tmp_path / "nothere", QUICK, output=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_prompt_that_leaves_no_room_is_wrong_and_says_so(short_model: Path, tmp_path: Path) -> None:
    api.evaluate(short_model, QUICK, output=tmp_path / "out")
    details = [record.detail for record in read_records(tmp_path / "out")]
    assert details == ["the prompt leaves no room for an answer"] * 4


def test_any_text_can_be_measured_long_ones_too(tiny_engine: Path, tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n}.py").write_text(f"x{n} = 1\n" * 700)
    result = api.evaluate(tiny_engine, EvalOptions(corpus=str(tmp_path)))
    spec = Session.open(tiny_engine).spec
    texts = evaluating.heldout_texts(str(tmp_path))
    assert result.rows[0].target.n == len(texts) > 0
    assert all(
        len(Session.open(tiny_engine).codec.encode(text)) > spec.max_position_embeddings for text in texts.values()
    )
