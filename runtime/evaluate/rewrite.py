"""Rewrites of a Python function's body that keep what it does: dead code, loops, operands, names of variables.

They are the code-syntax perturbations of ReCode (Wang et al., 2022), which has them from NatGen (Chakraborty et al.,
2022), done on Python's own syntax tree. A rewrite changes a ``Draft`` in place and says whether it did. It looks only
at what is shown, the lines before the cut, and gives up wherever it cannot tell that behaviour stays the same.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import string
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import count, dropwhile
from random import Random

from flabc.errors import CorpusError

#: A statement that marks where the shown half of a body ends. It is never seen in a prompt.
CUT = "__cut__"
#: How ``ast.unparse`` indents.
UNIT = "    "
#: Builtins that rewritten code calls: a function that binds one of them to something else is left alone.
CALLED = frozenset({"iter", "next", "object", "range"})
#: Builtins that see the names of local variables.
REFLECTION = frozenset({"dir", "eval", "exec", "globals", "locals", "vars"})
#: Builtins without effect, so that the order of two calls does not matter.
PURE = frozenset({"abs", "float", "int", "len", "list", "max", "min", "ord", "round", "set", "str", "sum", "tuple"})
#: Comparisons, and what they become when their sides change places.
MIRROR: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
}
#: What holds dead code, as often as in ReCode: a third each of for, while and if.
_DEAD = ("for {0} in range(0)",) * 3 + tuple(
    f"{prefix}{word} {condition}"
    for word in ("while", "if")
    for prefix, condition in (("", "False"), ("{0} = 0\n", "{0} < {0}"), ("{0} = 0\n", "{0} > {0}"))
)
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_CLOSURES = (*_SCOPES, ast.Lambda, ast.GeneratorExp)
_IMMOVABLE = (*_SCOPES, ast.Break, ast.Continue)


@dataclass(frozen=True)
class Draft:
    """A function to rewrite.

    Args:
        function: its body holds what follows the docstring.
        cut: the line of the mark, in the text that was parsed.
        outer: names that the rest of the program uses.
    """

    function: ast.FunctionDef
    cut: int
    outer: frozenset[str]

    def fresh(self, names: Iterator[str]) -> str:
        """The first of the names that means nothing yet."""
        taken = identifiers(self.function) | self.outer | {*dir(builtins), *keyword.kwlist}
        return next(name for name in names if name not in taken)


Rewrite = Callable[[Draft, Random], bool]


def parse(source: str) -> ast.Module:
    """As ``ast.parse``, without its warnings about backslashes in somebody else's docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def entry(module: ast.Module, name: str) -> ast.FunctionDef:
    """The function that a program ends with.

    Raises:
        CorpusError: if it ends with anything else.
    """
    last = module.body[-1] if module.body else None
    if not isinstance(last, ast.FunctionDef) or last.name != name:
        raise CorpusError(f"A problem's program does not end with the function {name!r}.")
    return last


def docstring(function: ast.FunctionDef) -> ast.Expr | None:
    """The statement that is the docstring. One that stands behind imports counts: HumanEval/115 has it there."""
    first = next(dropwhile(lambda statement: isinstance(statement, (ast.Import, ast.ImportFrom)), function.body), None)
    return first if isinstance(first, ast.Expr) and _is_text(first) else None


def identifiers(tree: ast.AST, but: tuple[type[ast.AST], ...] = ()) -> set[str]:
    """Every name in a tree, whatever it names, but those that the given kinds of node hold."""
    nodes = (node for node in ast.walk(tree) if not isinstance(node, (ast.Constant, *but)))
    fields = (value for node in nodes for _, value in ast.iter_fields(node))
    return {name for value in fields for name in (value if isinstance(value, list) else [value]) if _is_str(name)}


def layout(source: str, name: str) -> tuple[str, list[str]]:
    """A program's text through the docstring of its function, as it stands, and the lines after it.

    These are as Python writes a syntax tree: a statement a line, no comments.
    """
    function = entry(parse(source), name)
    start = _head_lines(function)
    return _join(source.split("\n")[:start]), _write(_body(function, start), indentation(source, function))


def rewritten(prompt: str, solution: str, name: str, rewrite: Rewrite, rng: Random) -> tuple[str, str] | None:
    """Prompt and solution, both in ``layout``, after a rewrite that shows in the prompt; None where there is none."""
    source, cut = _mark(prompt, solution)
    module = parse(source)
    function = entry(module, name)
    start, unit = _head_lines(function), indentation(source, function)
    function.body = _body(function, start)
    outer = frozenset(name for statement in module.body[:-1] for name in identifiers(statement))
    if not rewrite(Draft(function, cut, outer), rng):
        return None
    lines = _write(function.body, unit)
    at = next(number for number, line in enumerate(lines) if line.strip() == CUT)
    return _join(source.split("\n")[:start]) + _join(lines[:at]), _join(lines[at + 1 :])


def indentation(source: str, function: ast.FunctionDef) -> str:
    """The white space before a function's first statement."""
    first = source.split("\n")[function.body[0].lineno - 1]
    return first[: len(first) - len(first.lstrip())]


def reindent(source: str, old: str, new: str) -> str:
    """A program with every level of indentation written anew, docstrings along, other strings untouched."""
    module = parse(source)
    docs = {node.value for node in ast.walk(module) if isinstance(node, ast.Expr) and _is_text(node)}
    texts = (node for node in ast.walk(module) if isinstance(node, (ast.Constant, ast.JoinedStr)) and node not in docs)
    fixed = {row for node in texts for row in range(node.lineno, node.end_lineno or 0)}
    lines = source.split("\n")
    return "\n".join(line if row in fixed else _reindent_line(line, old, new) for row, line in enumerate(lines))


def dead_code(draft: Draft, rng: Random) -> bool:
    """Put a copy of a shown statement where it never runs.

    Both places are in one scope, or a name would become local where it was not.
    """
    options = [(places, donors) for places, donors in (_places(scope, draft.cut) for scope in _scopes(draft)) if donors]
    if not options or CALLED & _bound(draft.function):
        return False
    places, donors = rng.choice(options)
    block, at = rng.choice(places)
    name = draft.fresh(f"_i_{number}" for number in count(rng.randrange(10)))
    made = parse(f"{rng.choice(_DEAD)}:\n    pass".format(name)).body
    _block(made[-1])[:] = [deepcopy(rng.choice(donors))]
    block[at:at] = made
    return True


def for_while(draft: Draft, rng: Random) -> bool:
    """Write the first shown for loop as a while loop."""
    every = ((block, at) for scope in _scopes(draft) for block in _blocks(scope) for at in range(len(block)))
    loops = [(s.lineno, block, at) for block, at in every if isinstance(s := block[at], ast.For)]
    loops = sorted((loop for loop in loops if loop[0] < draft.cut), key=lambda loop: loop[0])
    if not loops or CALLED & _bound(draft.function):
        return False
    _, block, at = loops[0]
    loop = block[at]
    assert isinstance(loop, ast.For)
    block[at : at + 1] = _counting(loop, draft) or _iterating(loop, draft)
    return True


def operand_swap(draft: Draft, rng: Random) -> bool:
    """Swap the sides of the first shown comparison whose sides may be evaluated in either order."""
    nodes = [node for node in ast.walk(draft.function) if isinstance(node, ast.Compare) and _may_swap(node)]
    shown = [node for node in nodes if (node.end_lineno or 0) < draft.cut]
    if not shown:
        return False
    first = min(shown, key=lambda node: (node.lineno, node.col_offset))
    first.left, first.comparators = first.comparators[0], [first.left]
    first.ops = [MIRROR[type(first.ops[0])]()]
    return True


def rename_naive(draft: Draft, rng: Random) -> bool:
    """Call the local variable that is shown most often VAR_0."""
    return _rename(draft, lambda old: (f"VAR_{number}" for number in count()))


def rename_random(draft: Draft, rng: Random) -> bool:
    """Give the local variable that is shown most often a random name as long, digits as likely as letters."""

    def names(old: str) -> Iterator[str]:
        for extra in count():  # a length that has no free name left is made longer
            tail = rng.choices(string.ascii_letters + string.digits * 6, k=len(old) - 1 + extra // 100)
            yield rng.choice(string.ascii_letters) + "".join(tail)

    return _rename(draft, names)


def _rename(draft: Draft, names: Callable[[str], Iterator[str]]) -> bool:
    """Arguments keep their names, because the docstring speaks of them; so does what is more than a variable."""
    function = draft.function
    used = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    if REFLECTION & {node.id for node in used} or any(isinstance(node, ast.ClassDef) for node in ast.walk(function)):
        return False
    fixed = identifiers(function, but=(ast.Name, ast.Attribute, ast.keyword)) | draft.outer | {*dir(builtins)}
    free = {node.id for node in used if isinstance(node.ctx, ast.Store)} - fixed
    shown = sorted((n for n in used if n.id in free and n.lineno < draft.cut), key=lambda n: (n.lineno, n.col_offset))
    if not shown:
        return False
    old = Counter(node.id for node in shown).most_common(1)[0][0]
    new = draft.fresh(names(old))
    for node in used:
        node.id = new if node.id == old else node.id
    return True


def _counting(loop: ast.For, draft: Draft) -> list[ast.stmt] | None:
    """``for i in range(...)`` as a counter, where nobody could tell that it counts one further than the loop did."""
    steps = _range(loop.iter)
    if steps is None or not isinstance(loop.target, ast.Name):
        return None
    start, stop, step = steps
    name = loop.target.id
    inside = [node for statement in loop.body for node in ast.walk(statement)]
    uses = [node for node in inside if isinstance(node, ast.Name) and node.id == name]
    everywhere = [node for node in ast.walk(draft.function) if isinstance(node, ast.Name) and node.id == name]
    if (
        len(everywhere) > len(uses) + 1  # read or set elsewhere
        or not all(isinstance(node.ctx, ast.Load) for node in uses)
        or any(isinstance(node, (ast.Continue, *_CLOSURES)) for node in inside)
        or name in identifiers(draft.function, but=(ast.Name, ast.Attribute, ast.keyword))
    ):
        return None
    end = draft.fresh(_numbered("stop")) if identifiers(stop) else ast.unparse(stop)
    bound = f"{end} = {ast.unparse(stop)}\n" if identifiers(stop) else ""
    made = parse(f"{name} = {ast.unparse(start)}\n{bound}while {name} {'<' if step > 0 else '>'} {end}:\n    pass").body
    last = parse(f"{name} {'+' if step > 0 else '-'}= {abs(step)}").body
    return _fill(made, [*loop.body, *last], loop.orelse)


def _iterating(loop: ast.For, draft: Draft) -> list[ast.stmt]:
    """Any for loop, over its iterator and with nothing else assumed."""
    items, item, end = (draft.fresh(_numbered(name)) for name in ("items", "item", "end"))
    made = parse(
        f"{items} = iter({ast.unparse(loop.iter)})\n{end} = object()\n"
        f"while ({item} := next({items}, {end})) is not {end}:\n    pass"
    ).body
    return _fill(made, [*parse(f"{ast.unparse(loop.target)} = {item}").body, *loop.body], loop.orelse)


def _range(call: ast.expr) -> tuple[ast.expr, ast.expr, int] | None:
    """Start, stop and step of a call of range; None if it is none, or steps by what only running it would tell."""
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "range" or call.keywords:
        return None
    if not call.args or any(isinstance(argument, ast.Starred) for argument in call.args):
        return None
    start, stop, step = [ast.Constant(0), *call.args, ast.Constant(1)][len(call.args) > 1 :][:3]
    try:
        number = ast.literal_eval(step)
    except ValueError:
        return None
    return (start, stop, number) if isinstance(number, int) and number else None


def _may_swap(node: ast.Compare) -> bool:
    if len(node.ops) != 1 or type(node.ops[0]) not in MIRROR:
        return False
    sides = (node.left, node.comparators[0])
    fixed = any(not identifiers(side) for side in sides)  # a literal has no turn to lose
    return fixed or all(_is_pure(inner) for side in sides for inner in ast.walk(side))


def _is_pure(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in PURE
    return not isinstance(node, (ast.Await, ast.Yield, ast.YieldFrom, ast.NamedExpr))


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_text(statement: ast.stmt) -> bool:
    """Is it a string that stands alone?"""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _places(scope: ast.AST, cut: int) -> tuple[list[tuple[list[ast.stmt], int]], list[ast.stmt]]:
    """Where in a scope dead code may go, and which of its statements may be copied there."""
    every = [(block, at) for block in _blocks(scope) for at in range(len(block)) if not _is_text(block[at])]
    if any(isinstance(block[at], (ast.Global, ast.Nonlocal)) for block, at in every):
        return [], []  # what these declare must not be set before them
    shown = [block[at] for block, at in every if (block[at].end_lineno or 0) < cut]
    donors = [s for s in shown if not any(isinstance(node, _IMMOVABLE) for node in ast.walk(s))]
    return [(block, at) for block, at in every if block[at].lineno <= cut], donors


def _bound(function: ast.FunctionDef) -> set[str]:
    """Names to which a function gives a meaning, in itself or in what it defines."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | identifiers(function, but=(ast.Name, ast.Attribute, ast.keyword))


def _scopes(draft: Draft) -> list[ast.FunctionDef]:
    """The function and those that it defines."""
    return [node for node in ast.walk(draft.function) if isinstance(node, ast.FunctionDef)]


def _blocks(owner: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every block of statements in a scope, but not those of scopes inside it."""
    for _, value in ast.iter_fields(owner):
        if not isinstance(value, list):
            continue
        if value and isinstance(value[0], ast.stmt):
            yield value
        for part in value:
            if isinstance(part, (ast.stmt, ast.ExceptHandler, ast.match_case)) and not isinstance(part, _SCOPES):
                yield from _blocks(part)


def _block(statement: ast.stmt) -> list[ast.stmt]:
    """The body of an if or of a loop."""
    assert isinstance(statement, (ast.For, ast.While, ast.If))
    return statement.body


def _fill(made: list[ast.stmt], body: list[ast.stmt], orelse: list[ast.stmt]) -> list[ast.stmt]:
    loop = made[-1]
    assert isinstance(loop, ast.While)
    loop.body, loop.orelse = body, orelse
    return made


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}_{number}" if number else name for number in count())


def _mark(prompt: str, solution: str) -> tuple[str, int]:
    """Prompt and solution with the mark between them, and its line.

    It joins the deeper of the two lines that it stands between: the end of a block before an else, the begin of one
    after its header.
    """
    before = next((line for line in reversed(prompt.split("\n")) if line.strip()), "")
    after = next((line for line in solution.split("\n") if line.strip()), "")
    indent = max((line[: len(line) - len(line.lstrip())] for line in (before, after)), key=len)
    return f"{prompt}{indent}{CUT}\n{solution}", prompt.count("\n") + 1


def _head_lines(function: ast.FunctionDef) -> int:
    """How many lines of the program come before the code that is to be written."""
    doc = docstring(function)
    return (doc.end_lineno or 0) if doc else max(function.lineno, function.body[0].lineno - 1)


def _body(function: ast.FunctionDef, start: int) -> list[ast.stmt]:
    return [statement for statement in function.body if statement.lineno > start]


def _write(statements: list[ast.stmt], unit: str) -> list[str]:
    """The lines of a function's body."""
    shell = parse("def shell():\n    pass").body[0]
    assert isinstance(shell, ast.FunctionDef)
    shell.body = statements
    return reindent(ast.unparse(shell), UNIT, unit).split("\n")[1:] if statements else []


def _reindent_line(line: str, old: str, new: str) -> str:
    rest = line.lstrip(old[0])
    levels, spare = divmod(len(line) - len(rest), len(old))
    return new * levels + old[0] * spare + rest if rest.strip() else line


def _join(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
