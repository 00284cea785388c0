"""lm-evaluation-harness over an engine, against the harness over transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flabc import api
from flabc.errors import UsageError
from flabc.runtime.backend import Limits
from flabc.runtime.batch import generate_batch
from flabc.runtime.evaluate.harness import _generate, _likelihoods, language_model
from flabc.runtime.evaluate.perplexity import target_nll
from flabc.runtime.evaluate.task import EvalOptions
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

if TYPE_CHECKING:
    from .conftest import Served

pytestmark = pytest.mark.filterwarnings("default")  # what others warn of is theirs

QUESTIONS = [
    {"question": "def add(a, b): return a", "choices": [" + b", " - b", " * b"], "gold": 0},
    {"question": "class Point", "choices": [":", "(object):", " = 3"], "gold": 1},
    {"question": "for i in", "choices": [" range(3):", " of"], "gold": 0},
    {"question": "import", "choices": [" os", " the"], "gold": 0},
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""

CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""

GENERATE = """
output_type: generate_until
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two small tasks; the harness may reach no hub."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "choice.yaml").write_text(TASK.format(name="flabc_choice", file=file) + CHOICE)
    (folder / "generate.yaml").write_text(TASK.format(name="flabc_generate", file=file) + GENERATE)
    return folder


def test_likelihoods_and_texts_are_those_of_the_harness_over_transformers(
    tiny_engine: Path, tiny_checkpoint: Path, tasks: Path
) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    def samples(model: Any, **arguments: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks))
        names = ["flabc_choice", "flabc_generate"]
        found = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **arguments)
        return dict(found["samples"])

    ours = samples(language_model(Session.open(tiny_engine)))
    theirs = samples("hf", model_args={"pretrained": str(tiny_checkpoint), "dtype": "float32", "device": "cpu"})
    for mine, other in zip(ours["flabc_choice"], theirs["flabc_choice"], strict=True):
        for a, b in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert a[0] == pytest.approx(b[0], abs=2e-3)
            assert a[1] == b[1]
        assert (mine["acc"], mine["acc_norm"]) == (other["acc"], other["acc_norm"])
    mine, other = (
        # Half a character at the end is left out here, and a replacement character there.
        [row["filtered_resps"][0].rstrip("\ufffd") for row in side["flabc_generate"]]
        for side in (ours, theirs)
    )
    assert mine == other


def test_the_table_has_a_row_per_metric_and_pairs_the_sides(
    tiny_engine: Path, tiny_dense_engine: Path, tasks: Path
) -> None:
    options = EvalOptions(task="lm-eval:flabc_choice", data=tasks)
    result = api.evaluate(tiny_engine, options, baseline=tiny_dense_engine)
    assert [row.metric for row in result.rows] == ["flabc_choice acc", "flabc_choice acc_norm"]
    assert all(row.target.n == len(QUESTIONS) and row.test == "exact McNemar" for row in result.rows)


def test_a_server_is_asked_by_the_harness_itself(tiny_engine: Path, served: Served, tasks: Path) -> None:
    options = EvalOptions(task="lm-eval:flabc_choice", data=tasks, tokenizer=tiny_engine, batch=2)
    over_http = api.evaluate(served.url, options).rows
    in_process = api.evaluate(tiny_engine, options).rows
    assert [row.target for row in over_http] == [row.target for row in in_process]
    assert any(body.get("echo") for body in served.asked)
    generated = api.evaluate(served.url, EvalOptions(task="lm-eval:flabc_generate", data=tasks, batch=1))
    assert generated.rows[0].target.n == len(QUESTIONS)  # needs no tokenizer


def test_what_does_not_fit_is_cut_off_in_front(tiny_engine: Path) -> None:
    session = Session.open(tiny_engine, limits=Limits(max_length=64))
    ids = session.codec.encode_plain("def add(a, b):\n    return a + b\n" * 20)
    assert len(ids) > 130
    ((whole, _),) = _likelihoods(session, [(None, ids[:1], ids[1:])])  # more than fits, all of it asked for
    expected = target_nll(session.backend.score(np.array([ids[-65:-1]]))[0], np.array(ids[-64:]))
    assert whole == pytest.approx(-float(expected.sum()), rel=1e-5)


def test_a_task_that_it_does_not_know_is_named(tiny_engine: Path) -> None:
    with pytest.raises(UsageError, match="no task 'arc_eazy'"):
        api.evaluate(tiny_engine, EvalOptions(task="lm-eval:arc_eazy"))
    with pytest.raises(UsageError, match="--task lm-eval:"):
        api.evaluate(tiny_engine, EvalOptions(task="lm-eval"))


ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""


def test_what_is_no_mean_over_documents_is_named_and_not_averaged(
    tiny_engine: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = TASK.format(name="flabc_rolling", file=tasks / "questions.jsonl")
    (tasks / "rolling.yaml").write_text(given + ROLLING)
    with pytest.raises(UsageError, match="more is better: flabc_rolling word_perplexity"):
        api.evaluate(tiny_engine, EvalOptions(task="lm-eval:flabc_rolling", data=tasks))
    both = api.evaluate(tiny_engine, EvalOptions(task="lm-eval:flabc_rolling,flabc_choice", data=tasks))
    assert [row.metric for row in both.rows] == ["flabc_choice acc", "flabc_choice acc_norm"]
    assert "left out, since no mean over documents of which more is better: flabc_rolling" in capsys.readouterr().err


def test_a_task_that_asks_for_more_than_there_is_room_for_still_shows_its_prompts(
    tiny_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = Session.open(tiny_engine, limits=Limits(max_length=64))
    context = "def add(a, b):\n    return a + b\n" * 20
    (answer,) = _generate(session, [SimpleNamespace(args=(context, {"max_gen_toks": 32768}))])
    ids = session.encode(context)
    assert len(ids) > 64
    shown = SamplingParams(max_tokens=32)
    assert answer == dict(generate_batch(session, [ids[-32:]], [shown]))[0].text
    assert "room for 64 tokens, so 1 of 1 prompts were cut off in front, and 1 answers" in capsys.readouterr().err
