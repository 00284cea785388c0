"""Syntax: a module's source as statements, which of them binds which name, and what a function needs of them."""

from __future__ import annotations

import ast
import builtins
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: Longest imports that stand on one line.
LINE = 100


@dataclass(frozen=True)
class Home:
    """Where a module is.

    Args:
        module: its name, with dots.
        package: whether it is a package's ``__init__``.
    """

    module: str
    package: bool

    def absolute(self, statement: ast.ImportFrom) -> str:
        """The module that it imports from, by its whole name."""
        if not statement.level:
            return statement.module or ""
        parts = self.module.split(".")
        kept = parts[: len(parts) - statement.level + (1 if self.package else 0)]
        return ".".join([*kept, *([statement.module] if statement.module else [])])


class Module:
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
        return "\n".join(self.lines[first_line(statement) - 1 : statement.end_lineno])

    def needed(self, nodes: Iterable[ast.AST], but: Sequence[ast.stmt], known: frozenset[str]) -> list[ast.stmt]:
        """The statements that nodes need, and those that these need, in the module's order.

        It ends early at a statement that imports what is foreign: the whole is of no use then.

        Args:
            nodes: what needs them.
            but: statements that are not looked for.
            known: packages that are not foreign.
        """
        found, left = list[ast.stmt](), list(nodes)
        while left:
            for name in self._loaded(left.pop()):
                for statement in self.binds.get(name, ()):
                    if statement not in found and statement not in but:
                        found.append(statement)
                        left.append(statement)
                        if is_foreign(statement, known):
                            return found
        return sorted(found, key=lambda statement: statement.lineno)

    def imports(self, function: ast.FunctionDef, home: Home) -> list[str]:
        """Lines that import what a function needs of its module, from where the module has it, or from the module.

        Args:
            function: one of its functions.
            home: where the module is.
        """
        plain, froms = set[str](), dict[str, set[str]]()
        stars = any(isinstance(s, ast.ImportFrom) and s.names[0].name == "*" for s in self.tree.body)
        for name in self._loaded(function) - _bound_inside(function) - {function.name}:
            statements = self.binds.get(name, [])
            if not statements and (not stars or hasattr(builtins, name)):
                continue
            if statements and all(map(_is_for_types, statements)):
                continue
            last = statements[-1] if statements else None
            if isinstance(last, ast.Import):
                plain |= {ast.unparse(ast.Import([each])) for each in last.names if _called(each) == name}
            elif isinstance(last, ast.ImportFrom):
                chosen = {ast.unparse(each) for each in last.names if _called(each) == name}
                froms.setdefault(home.absolute(last), set()).update(chosen)
            else:
                froms.setdefault(home.module, set()).add(name)
        future = [self.source(s) for s in self.future() if s.names[0].name != "annotations" or _is_annotated(function)]
        froms.pop("__future__", None)
        return [*future, *sorted(plain), *(_from(each, sorted(names)) for each, names in sorted(froms.items()))]

    def reads(self, nodes: Iterable[ast.AST]) -> set[str]:
        """The names that nodes read, and that neither they nor the module nor Python bind."""
        trees = list(nodes)
        read = set[str]().union(*map(self._loaded, trees)) - set[str]().union(*map(_bound_inside, trees))
        return {name for name in read if name not in self.binds and not hasattr(builtins, name)}

    def _loaded(self, node: ast.AST) -> set[str]:
        """The names that a node reads, as far as its syntax tells."""
        if node not in self._reads:
            names = (each for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load))
            self._reads[node] = {name.id for name in names}
        return self._reads[node]

    def future(self) -> list[ast.ImportFrom]:
        """Its imports from ``__future__``: they change what code means."""
        return [s for s in self.tree.body if isinstance(s, ast.ImportFrom) and s.module == "__future__"]


def parsed(source: str) -> Module | None:
    """A source's module; None if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in strings of other people's code
        try:
            return Module(source, ast.parse(source))
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
            names |= set(map(_called, node.names))
    return names


def _bound_inside(node: ast.AST) -> set[str]:
    """The names that a node binds for itself: arguments, what is assigned, imported, or defined in it."""
    names = set[str]()
    for each in ast.walk(node):
        if isinstance(each, ast.arg):
            names.add(each.arg)
        elif isinstance(each, ast.stmt) and each is not node:
            names |= _bound(each)
        elif isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            names.add(each.id)
    return names


def _is_annotated(function: ast.FunctionDef) -> bool:
    given = function.args
    named = (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg)
    inside = any(isinstance(node, ast.AnnAssign) for node in ast.walk(function))
    return inside or function.returns is not None or any(each is not None and each.annotation for each in named)


def _called(alias: ast.alias) -> str:
    """The name that an import binds."""
    return (alias.asname or alias.name).split(".")[0]


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether it is there for type checkers only."""
    return isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test)


def _from(module: str, names: Sequence[str]) -> str:
    line = f"from {module} import {', '.join(names)}"
    if len(line) <= LINE:
        return line
    return f"from {module} import (\n" + "".join(f"    {name},\n" for name in names) + ")"


def first_line(statement: ast.stmt) -> int:
    """The line that a statement begins at, decorators included."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(decorator.lineno for decorator in decorators)])


def is_foreign(code: ast.AST, known: frozenset[str]) -> bool:
    """Whether code imports something that neither comes with Python nor is known, or nobody knows what."""
    for node in ast.walk(code):
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names)):
            return True
    return any(name.split(".")[0] not in known for name in imported([code]))


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules that code imports and that do not come with Python."""
    found = set[str]()
    for node in (each for one in nodes for each in ast.walk(one)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    with_python = {*sys.stdlib_module_names, "__main__"}
    return {name for name in found if name.split(".")[0] not in with_python}
