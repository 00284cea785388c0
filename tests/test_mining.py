"""Mining put together: what is kept passes its own test in the sandbox, and ``flabc eval`` reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from flabc import mining
from flabc.cli import cli
from flabc.compress.data.projects import projects
from flabc.errors import CorpusError, UsageError
from flabc.runtime.evaluate.sandbox import SandboxLimits, run_all
from flabc.runtime.evaluate.tasks import mined

GOOD = '''
def twice(x):
    """Two times what is given.

    >>> twice(3)
    6
    """
    return 2 * x
'''

WRONG = '''
def thrice(x):
    """Three times what is given, says a liar.

    >>> thrice(3)
    10
    """
    return 3 * x
'''

SILENT = '''
def hush(x):
    """Does nothing that anybody could see.

    >>> hush(3)
    """
'''

COPIED = '''
def truncate_number(number: float) -> float:
    """ Given a positive floating point number, it can be decomposed into
    and integer part (largest integer smaller than given number) and decimals
    (leftover part always smaller than 1).

    Return the decimal part of the number.
    >>> truncate_number(3.5)
    0.5
    """
    return number % 1.0
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, text in (("a", GOOD), ("b", GOOD), ("c", WRONG), ("d", SILENT + "    return None\n"), ("e", COPIED)):
        (folder / f"{name}.py").write_text(text)
    return folder


def test_each_step_takes_out_what_it_is_for(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "tasks.jsonl"
    done = CliRunner().invoke(cli, ["data", "mine", str(project), "-o", str(out), "--json", "--allow-code-execution"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["counts"] == {
        **{"projects": 1, "files": 5, "functions": 5, "licensed": 5, "complete": 5},
        **{"distinct": 4, "unknown": 3, "passing": 2, "tasks": 1},
    }
    (row,) = map(json.loads, out.read_text().splitlines())
    assert (row["task_id"], row["project"], row["entry_point"]) == ("theirs/a:twice", "theirs", "twice")
    with pytest.raises(UsageError, match="exists"):
        mining.mine([str(project)], out, allow_code_execution=True)


def test_eval_reads_them_and_grades_the_canonical_solution_as_right(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tasks.jsonl"
    monkeypatch.setattr("flabc.compress.data.mining.split_of", lambda project: "dev")
    mining.mine([str(project)], out, allow_code_execution=True)
    (row,) = map(json.loads, out.read_text().splitlines())
    (problem,) = mined.problems(out, ["dev"])
    programs = [
        problem.grading.continued(row["canonical_solution"]),  # type: ignore[union-attr]
        problem.grading.answered(row["prompt"] + row["canonical_solution"]),  # type: ignore[union-attr]
        problem.grading.continued("    return x"),  # type: ignore[union-attr]
    ]
    assert [verdict.passed for _, verdict in sorted(run_all(programs, SandboxLimits()))] == [True, True, False]


def test_a_function_takes_the_place_of_its_packages_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of networkx, whose doctests call ``nx.f``, and of the standard library, by its own tests."""
    pytest.importorskip("test.test_shlex", reason="Python came without its own tests")
    (networkx,), (library,) = projects("networkx"), projects("python-stdlib")
    few = replace(networkx, files=_named(networkx.files, "components/strongly_connected.py"), tests=())
    ((file, tests),) = _named(library.tests, "test_shlex.py")
    elsewhere = f"{tests}\n\ndef on_another_system():\n    import nowhere.at.all\n"
    shlex = replace(library, files=_named(library.files, "shlex.py"), tests=((file, elsewhere),))
    monkeypatch.setattr(mining, "projects", lambda source: [few, shlex])
    monkeypatch.setattr("flabc.compress.data.mining.split_of", lambda project: "dev")
    found = mining.mine(["both"], tmp_path / "tasks.jsonl", allow_code_execution=True)
    assert set(found.tested_by) == {"doctests", "tests"}
    assert found.needs == {"packages": found.sources["networkx"], "Python only": found.sources["python-stdlib"]}
    problems = {problem.task_id: problem for problem in mined.problems(found.path, ["dev"])}
    rows = {row["task_id"]: row for row in map(json.loads, found.path.read_text().splitlines())}
    assert rows["python-stdlib/shlex:quote"]["imports"] == ["shlex", "test.test_shlex"]
    name = "networkx/networkx/algorithms/components/strongly_connected:is_strongly_connected"
    own = "    import networkx\n    return networkx.is_strongly_connected(G)"
    programs = [
        problems[name].grading.continued(rows[name]["canonical_solution"]),  # type: ignore[union-attr]
        problems[name].grading.continued("    return True"),  # type: ignore[union-attr]
        problems[name].grading.continued(own),  # type: ignore[union-attr]
    ]
    assert [verdict.passed for _, verdict in sorted(run_all(programs, SandboxLimits()))] == [True, False, False]


def _named(files: tuple[tuple[str, str], ...], end: str) -> tuple[tuple[str, str], ...]:
    return tuple(file for file in files if file[0].endswith(end))


def test_tasks_whose_packages_are_not_installed_are_refused(tmp_path: Path) -> None:
    row = {"task_id": "a", "prompt": "def f():\n", "test": "", "split": "dev", "imports": ["nowhere.at.all", "json"]}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(row))
    with pytest.raises(CorpusError, match=r"1 tasks need packages.*nowhere"):
        mined.problems(tmp_path / "tasks.jsonl", ["dev"])


def test_a_licence_that_is_wanted_is_asked_for(project: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="5 such functions, of which 0"):
        mining.mine([str(project)], tmp_path / "none.jsonl", licences=["mit"], allow_code_execution=True)
    (project / "pyproject.toml").write_text('[project]\nlicense = "MIT"\n')
    found = mining.mine([str(project)], tmp_path / "mit.jsonl", licences=["mit", "bsd"], allow_code_execution=True)
    assert found.licences == {"MIT": 1}


@pytest.mark.parametrize(
    ("licence", "wanted"),
    [
        ("MIT", True),
        ("MIT License", True),
        ("BSD-3-Clause AND MIT", True),
        ("GPL-3.0 OR MIT", True),
        ("(GPL-3.0 OR MIT) AND BSD-2-Clause", True),
        ("GPL-3.0 AND MIT", False),
        ("LIMITED", False),
        ("", False),
    ],
)
def test_licences_are_read_as_expressions(licence: str, wanted: bool) -> None:
    assert mining._is_wanted(licence, ["mit", "bsd"]) is wanted


def test_gaps_in_the_sandbox_have_to_be_accepted(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flabc.runtime.evaluate.sandbox import LEVELS

    monkeypatch.setattr(mining, "isolation", lambda: LEVELS["seccomp"])
    with pytest.raises(UsageError, match=r"Files are not protected.*--allow-code-execution"):
        mining.mine([str(project)], tmp_path / "tasks.jsonl")
