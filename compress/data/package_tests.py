"""A package's own tests: which of them are about one function, by what they call.

A test counts for a function if it calls no other function of the package, asserts something itself, and needs nothing
but its module and its class: no fixture, no parameter, no decorator, no helper method of its class. What classes
make are values, and may stand in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from .projects import Project
from .syntax import Home, Module, imported, parsed

#: Tests of a function that are run.
MOST_TESTS = 8

#: Methods of a test's own that are no helpers.
_OF_TESTS = ("assert", "fail", "subTest", "skip")

#: Packages that tests test with.
_TOOLS = frozenset({"unittest", "test", "pytest", "warnings", "contextlib", "itertools", "functools"})


@dataclass(frozen=True)
class OwnTests:
    """The tests of one function in one module.

    Args:
        module: the module that they are in.
        names: ``test_this`` or ``Class.test_this``.
        imports: what the module imports that does not come with Python.
    """

    module: str
    names: tuple[str, ...]
    imports: frozenset[str]


def home_of(file: str) -> Home:
    """Where the module of a file is, by its path."""
    path = PurePosixPath(file)
    package = path.name == "__init__.py"
    parts = path.parent.parts if package else path.with_suffix("").parts
    return Home(".".join(parts), package)


def top_packages(project: Project) -> frozenset[str]:
    """The packages and modules of a project that lie in none."""
    return frozenset(home_of(file).module.split(".")[0] for file, _ in project.files)


def own_tests(project: Project, own: frozenset[str]) -> dict[tuple[str, str], list[OwnTests]]:
    """Tests by the top package and the name of the function that they are about; ``own`` are the project's."""
    found = dict[tuple[str, str], list[OwnTests]]()
    for file, source in project.tests:
        module = parsed(source)
        if module is None:
            continue
        home = home_of(file)
        of_file = dict[tuple[str, str], list[str]]()
        origins = _origins(module, home)
        for name, test in _functions(module):
            about = _about(test, origins, own)
            if about is not None:
                of_file.setdefault(about, []).append(name)
        foreign = frozenset(imported([module.tree]))
        for about, names in of_file.items():
            found.setdefault(about, []).append(OwnTests(home.module, tuple(names), foreign))
    return {about: _few(tests) for about, tests in found.items()}


def _few(tests: list[OwnTests]) -> list[OwnTests]:
    kept, room = list[OwnTests](), MOST_TESTS
    for each in tests:
        if room > 0:
            kept.append(OwnTests(each.module, each.names[:room], each.imports))
            room -= len(kept[-1].names)
    return kept


def _origins(module: Module, home: Home) -> dict[str, str]:
    """What the names that a module imports stand for, with dots."""
    found = dict[str, str]()
    for statement in module.tree.body:
        if isinstance(statement, ast.ImportFrom):
            where = home.absolute(statement)
            found |= {alias.asname or alias.name: f"{where}.{alias.name}" for alias in statement.names}
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                top = alias.name.split(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
    return found


def _functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for statement in module.tree.body:
        if isinstance(statement, ast.FunctionDef) and _is_plain(statement, []):
            yield statement.name, statement
        elif isinstance(statement, ast.ClassDef) and not statement.decorator_list:
            methods = [each for each in statement.body if isinstance(each, ast.FunctionDef)]
            if any(method.name.startswith(("setup", "teardown")) for method in methods):  # pytest's, not unittest's
                continue
            for method in methods:
                if _is_plain(method, ["self"]):
                    yield f"{statement.name}.{method.name}", method


def _is_plain(function: ast.FunctionDef, arguments: list[str]) -> bool:
    given = function.args
    named = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return (
        function.name.startswith("test")
        and not function.decorator_list
        and named == arguments
        and not (given.vararg or given.kwarg)
    )


def _about(test: ast.FunctionDef, origins: Mapping[str, str], own: Iterable[str]) -> tuple[str, str] | None:
    """The one function of the package that a test calls, as (top package, name)."""
    about, asserts = set[tuple[str, str]](), False
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            asserts = True
        if not isinstance(node, ast.Call):
            continue
        dotted = _dotted(node.func)
        first, _, rest = dotted.partition(".")
        if first == "self":
            if not rest.startswith(_OF_TESTS):
                return None
            asserts = asserts or rest.startswith("assert")
            # what is handed to assertRaises is called too
            dotted = _dotted(node.args[1]) if rest.startswith("assertRaises") and len(node.args) > 1 else ""
            first, _, rest = dotted.partition(".")
        origin = origins.get(first)
        if origin is None:
            continue
        whole = f"{origin}.{rest}" if rest else origin
        top, name = whole.split(".")[0], whole.rpartition(".")[2]
        if top in own and top not in _TOOLS and not name[:1].isupper() and name != top:
            about.add((top, name))
        elif name.startswith("assert_"):
            asserts = True
    return about.pop() if asserts and len(about) == 1 else None


def _dotted(node: ast.AST) -> str:
    """A name with dots; nothing if it is none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""
