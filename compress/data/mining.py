"""Mining: functions with docstrings, and doctests or tests of their package, become tasks that can be run.

What a function needs of its module stands before it in the prompt: its imports, constants and other functions, where
these need nothing of the function's own package. Otherwise the prompt imports all that from the package, which is
installed, and the task's function is put in the place of the package's own, wherever that has it, before the tests run.
Doctests are taken out of the prompt unless they are asked for, since they give the answers away.
"""

from __future__ import annotations

import ast
import doctest
import functools
import hashlib
import importlib.metadata
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from .package_tests import OwnTests, home_of, own_tests, top_packages
from .projects import Project
from .syntax import Home, Module, first_line, imported, is_foreign, parsed
from .task_tests import ALIASES, of_examples, of_tests

Split = Literal["train", "dev", "test"]

#: Of a hundred projects, so many are for testing and so many for development.
TEST_PERCENT, DEV_PERCENT = 10, 10

#: Characters of what a function needs of its module, and of the function itself, at most.
LONGEST_CONTEXT, LONGEST_FUNCTION = 4000, 6000

#: Words that a docstring must have beside its doctests, if these are taken out: nobody can guess what is not said.
FEWEST_WORDS = 4

#: A function that does nothing; a test that it passes tests nothing.
EMPTY = "    pass\n"

#: A line that announces examples, and a rule under it.
_HEADING = re.compile(
    r"\n[ \t]*(?:for |an )?(?:examples?|e\.g\.|usage|doctests?|tests?)\b[^\n]{0,30}"
    r"(?:\n[ \t]*[-=~^]+[ \t]*)?\s*\Z",
    re.IGNORECASE,
)

#: What defines a function of the module itself.
_DEFINED = re.compile(r"^def (\w+)\(", re.MULTILINE)

_Kind = Literal["doctests", "tests"]


@dataclass(frozen=True)
class Task:
    """A task; its fields are those of a line of the file.

    Args:
        task_id: project, file and function.
        project: whose code it is.
        licence: the project's.
        split: the side that the project is on.
        prompt: what the function needs, its signature and its docstring.
        canonical_solution: its body.
        test: code that runs behind them and fails by raising.
        entry_point: its name.
        tested_by: where the test is from.
        imports: modules that prompt or test import and that have to be installed.
    """

    task_id: str
    project: str
    licence: str
    split: Split
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str
    tested_by: Literal["doctests", "tests"] = "doctests"
    imports: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        """The function alone, without what it needs of its module."""
        return "".join(self.prompt.rpartition(f"def {self.entry_point}(")[1:]) + self.canonical_solution

    def program(self, body: str | None = None) -> str:
        """Prompt, a body (by default the function's own) and test, as the evaluation puts them together."""
        return f"{self.prompt}{self.canonical_solution if body is None else body}\n{self.test}"


def split_of(project: str) -> Split:
    """The side that a project is on, by the hash of its name alone."""
    place = int.from_bytes(hashlib.sha256(project.encode()).digest()[:8], "big") % 100
    if place < TEST_PERCENT:
        return "test"
    return "dev" if place < TEST_PERCENT + DEV_PERCENT else "train"


def mine(project: Project, *, keep_doctests: bool = False) -> Iterator[Task | str]:
    """A task for each function with doctests or tests, or, of one that cannot become one, the reason in a few words.

    Args:
        project: whose code.
        keep_doctests: leave the doctests in the prompt.
    """
    own = top_packages(project)
    tests = own_tests(project, own) if project.importable else {}
    tested = {name for _, name in tests}
    for file, source in project.files:
        if ">>>" not in source and tested.isdisjoint(_DEFINED.findall(source)):
            continue
        module = parsed(source)
        if module is None:
            continue
        home = home_of(file)
        for function in module.functions():
            found = _Function(project, file, module, function, home, own)
            examples = _examples(function)
            of_package = tests.get((home.module.split(".")[0], function.name), [])
            if examples:
                yield found.of_examples(examples, keep_doctests=keep_doctests)
            elif of_package and ast.get_docstring(function):
                yield found.of_tests(of_package)


@functools.cache
def _installed() -> frozenset[str]:
    return frozenset(importlib.metadata.packages_distributions())


@dataclass(frozen=True)
class _Function:
    """A function, and where it was found."""

    project: Project
    file: str
    module: Module
    node: ast.FunctionDef
    home: Home
    own: frozenset[str]

    def of_examples(self, examples: list[doctest.Example], *, keep_doctests: bool) -> Task | str:
        """A task whose test are doctests: by itself, or else in its package."""
        if (flaw := self._flaw()) is not None:
            return flaw
        docstring, called = self.node.body[0], [tree for each in examples if (tree := _tree(each.source))]
        said = self.module.source(docstring) if keep_doctests else _words(docstring, ast.get_docstring(self.node) or "")
        if not said:
            return "too few words"
        known = _installed() - self.own
        context = self.module.needed([self.node], [self.node], known)
        for_test = self.module.needed(called, [self.node, *context], known)
        foreign = any(is_foreign(each, known) for each in (*context, *for_test))
        if not foreign and not any(is_foreign(each, known) for each in called):
            need = [self.module.source(statement) for statement in _unique([*self.module.future(), *context])]
            helpers = "".join(f"{self.module.source(statement)}\n" for statement in for_test)
            test = helpers + of_examples(self.node.name, _text(examples))
            made = self._made(
                need, first_line(self.node), said, test, "doctests", imported([*context, *for_test, *called])
            )
            if isinstance(made, Task) or not self.project.importable:
                return made
        if not self.project.importable:
            return "needs what is not installed" if foreign else "its doctests import what is not installed"
        aliases = {name: ALIASES[name] for name in self.module.reads(called) if name in ALIASES}
        test = of_examples(self.node.name, _text(examples), self.home.module, aliases)
        return self._in_place(said, test, "doctests", {*imported(called), *aliases.values()})

    def of_tests(self, tests: Sequence[OwnTests]) -> Task | str:
        """A task whose test are tests of its package."""
        if (flaw := self._flaw()) is not None:
            return flaw
        said = _words(self.node.body[0], ast.get_docstring(self.node) or "")
        if not said:
            return "too few words"
        test = of_tests(self.node.name, self.home.module, [(each.module, each.names) for each in tests])
        modules = {name for each in tests for name in (*each.imports, each.module)}
        return self._in_place(said, test, "tests", modules)

    def _flaw(self) -> str | None:
        docstring, *body = self.node.body
        if not body:
            return "no body"
        if docstring.lineno <= self.node.lineno or body[0].lineno <= (docstring.end_lineno or 0):
            return "several statements on a line"
        return None

    def _in_place(self, said: str, test: str, kind: _Kind, modules: set[str]) -> Task | str:
        """A task that imports what it needs. Decorators are left away: they are the package's business."""
        if any(isinstance(node, ast.Global) for node in ast.walk(self.node)):
            return "changes its module"
        bare = ast.FunctionDef(**{**vars(self.node), "decorator_list": []})
        need = self.module.imports(bare, self.home)
        modules = modules | {self.home.module} | _imported_by(need)
        return self._made(need, self.node.lineno, said, test, kind, modules)

    def _made(
        self, need: Sequence[str], line: int, said: str, test: str, kind: _Kind, modules: Iterable[str]
    ) -> Task | str:
        """The task, if it is not too long."""
        docstring, lines, name = self.node.body[0], self.module.lines, self.node.name
        begin = "\n".join(lines[line - 1 : docstring.lineno - 1])
        solution = "\n".join(lines[docstring.end_lineno or 0 : self.node.end_lineno]) + "\n"
        before = "\n".join(need)
        if len(before) > LONGEST_CONTEXT or len(begin) + len(said) + len(solution) > LONGEST_FUNCTION:
            return "too long"
        return Task(
            task_id=f"{self.project.name}/{PurePosixPath(self.file).with_suffix('')}:{name}",
            project=self.project.name,
            licence=self.project.licence,
            split=split_of(self.project.name),
            prompt=f"{before}\n\n\n{begin}\n{said}\n" if before else f"{begin}\n{said}\n",
            canonical_solution=solution,
            test=test,
            entry_point=name,
            tested_by=kind,
            imports=tuple(sorted(modules)),
        )


def _imported_by(lines: Sequence[str]) -> set[str]:
    tree = _tree("\n".join(lines))
    return imported([tree]) if tree else set()


def _examples(function: ast.FunctionDef) -> list[doctest.Example]:
    text = ast.get_docstring(function)
    if not text or ">>>" not in text:
        return []
    try:
        return doctest.DocTestParser().get_examples(text)
    except ValueError:  # what looks like a doctest and is none
        return []


def _tree(source: str) -> ast.Module | None:
    found = parsed(source)
    return found.tree if found else None


def _unique(statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    return list(dict.fromkeys(statements))


def _words(docstring: ast.stmt, text: str) -> str:
    """The docstring's source without its doctests; nothing if too little is left."""
    parts: list[Any] = doctest.DocTestParser().parse(text)
    kept = ""
    for part in parts:
        if isinstance(part, doctest.Example):
            kept = _HEADING.sub("\n", kept)
        else:
            kept += part
    kept = re.sub(r"\n\s*\n\s*\n+", "\n\n", inspect.cleandoc(kept)).strip()
    if len(re.findall(r"[^\W\d_]{2,}", kept)) < FEWEST_WORDS:
        return ""
    escaped = kept.replace("\\", "\\\\").replace('"""', r"\"\"\"")
    if escaped.endswith('"'):
        escaped = f'{escaped[:-1]}\\"'
    lines = f'"""{escaped}"""' if "\n" not in escaped else f'"""{escaped}\n"""'
    return textwrap.indent(lines, " " * docstring.col_offset)


def _text(examples: Iterable[doctest.Example]) -> str:
    """Examples as a doctest again, apart by empty lines."""
    parts = []
    for example in examples:
        first, *rest = example.source.rstrip("\n").split("\n")
        lines = [f">>> {first}", *(f"... {line}".rstrip() if not line else f"... {line}" for line in rest)]
        parts.append("\n".join(lines) + "\n" + example.want)
    return "\n".join(parts)
