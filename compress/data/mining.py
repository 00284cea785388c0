"""Mining: functions whose docstrings hold doctests become tasks that can be run.

What a function needs of its module (imports of the standard library, constants, other functions) stands before it in
the prompt, so that a task runs by itself. The doctests are the test; they are taken out of the prompt unless they are
asked for, since they give the answers away.
"""

from __future__ import annotations

import ast
import doctest
import hashlib
import inspect
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

from .projects import Project

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

_TEST = """
def _check_examples():
    import doctest

    told = []
    examples = doctest.DocTestParser().get_doctest(_EXAMPLES, dict(globals()), {name!r}, None, 0)
    failed = doctest.DocTestRunner(verbose=False).run(examples, out=told.append).failed
    assert not failed, "".join(told)[-300:]


_EXAMPLES = {examples}
_check_examples()
"""


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
    """

    task_id: str
    project: str
    licence: str
    split: Split
    prompt: str
    canonical_solution: str
    test: str
    entry_point: str

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
    """A task for each function with doctests, or, of one that cannot become a task, the reason in a few words.

    Args:
        project: whose code.
        keep_doctests: leave the doctests in the prompt.
    """
    for file, source in project.files:
        module = _parsed(source) if ">>>" in source else None
        if module is None:
            continue
        for function in module.functions():
            if examples := _examples(function):
                yield _task(project, file, module, function, examples, keep_doctests=keep_doctests)


class _Module:
    """A module's source, and which of its statements binds which name."""

    def __init__(self, source: str, tree: ast.Module) -> None:
        self.lines = source.split("\n")
        self.tree = tree
        self.binds: dict[str, list[ast.stmt]] = {}
        self._reads: dict[ast.AST, set[str]] = {}
        for statement in tree.body:
            for name in _bound(statement):
                self.binds.setdefault(name, []).append(statement)

    def functions(self) -> list[ast.FunctionDef]:
        """The functions of the module itself that are defined once."""
        found = [statement for statement in self.tree.body if isinstance(statement, ast.FunctionDef)]
        return [function for function in found if len(self.binds[function.name]) == 1]

    def source(self, statement: ast.stmt) -> str:
        """The lines of a statement, decorators included."""
        return "\n".join(self.lines[_first_line(statement) - 1 : statement.end_lineno])

    def needed(self, nodes: Iterable[ast.AST], but: Sequence[ast.stmt]) -> list[ast.stmt]:
        """The statements that nodes need, and those that these need, in the module's order.

        It ends early at a statement that imports what is foreign: the whole is of no use then.
        """
        found, left = list[ast.stmt](), list(nodes)
        while left:
            for name in self._loaded(left.pop()):
                for statement in self.binds.get(name, ()):
                    if statement not in found and statement not in but:
                        found.append(statement)
                        left.append(statement)
                        if is_foreign(statement):
                            return found
        return sorted(found, key=lambda statement: statement.lineno)

    def _loaded(self, node: ast.AST) -> set[str]:
        """The names that a node reads, as far as its syntax tells."""
        if node not in self._reads:
            names = (each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load))
            self._reads[node] = {name.id for name in names}
        return self._reads[node]

    def future(self) -> list[ast.stmt]:
        """Its imports from ``__future__``: they change what code means."""
        return [s for s in self.tree.body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]


def _parsed(source: str) -> _Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings of other people's code
        try:
            return _Module(source, ast.parse(source))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module binds."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {statement.name}
    names = set[str]()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return names


def _first_line(statement: ast.stmt) -> int:
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def _examples(function: ast.FunctionDef) -> list[doctest.Example]:
    text = ast.get_docstring(function)
    if not text or ">>>" not in text:
        return []
    try:
        return doctest.DocTestParser().get_examples(text)
    except ValueError:  # what looks like a doctest and is none
        return []


def _task(
    project: Project,
    file: str,
    module: _Module,
    function: ast.FunctionDef,
    examples: list[doctest.Example],
    *,
    keep_doctests: bool,
) -> Task | str:
    docstring, *body = function.body
    if not body:
        return "no body"
    if docstring.lineno <= function.lineno or body[0].lineno <= (docstring.end_lineno or 0):
        return "several statements on a line"
    called = [tree for example in examples if (tree := _tree(example.source))]
    context = module.needed([function], [function])
    for_test = module.needed(called, [function, *context])
    if any(map(is_foreign, (*context, *for_test))):
        return "needs what is not of the standard library"
    if any(map(is_foreign, called)):
        return "its doctests import what is not of the standard library"
    begin = "\n".join(module.lines[_first_line(function) - 1 : docstring.lineno - 1])
    said = module.source(docstring) if keep_doctests else _words(docstring, ast.get_docstring(function) or "")
    if not said:
        return "too few words"
    need = "\n".join(module.source(statement) for statement in _unique([*module.future(), *context]))
    solution = "\n".join(module.lines[docstring.end_lineno or 0 : function.end_lineno]) + "\n"
    if len(need) > LONGEST_CONTEXT or len(begin) + len(said) + len(solution) > LONGEST_FUNCTION:
        return "too long"
    helpers = "".join(f"{module.source(statement)}\n" for statement in for_test)
    return Task(
        task_id=f"{project.name}/{PurePosixPath(file).with_suffix('')}:{function.name}",
        project=project.name,
        licence=project.licence,
        split=split_of(project.name),
        prompt=f"{need}\n\n\n{begin}\n{said}\n" if need else f"{begin}\n{said}\n",
        canonical_solution=solution,
        test=helpers + _TEST.format(name=function.name, examples=repr(_text(examples))),
        entry_point=function.name,
    )


def _tree(source: str) -> ast.Module | None:
    parsed = _parsed(source)
    return parsed.tree if parsed else None


def _unique(statements: Iterable[ast.stmt]) -> list[ast.stmt]:
    return list(dict.fromkeys(statements))


def is_foreign(code: ast.AST) -> bool:
    """Whether code imports something that does not come with Python, or nobody knows what."""
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom):
            if node.level or any(alias.name == "*" for alias in node.names):
                return True
            modules: list[str] = [node.module or ""]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        if any(name.split(".")[0] not in sys.stdlib_module_names for name in modules):
            return True
    return False


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
