"""Perturbations of a problem's prompt that leave the task as it is: those of ReCode (Wang et al., 2022) for HumanEval.

A perturbation is a pure function of a ``CodeProblem`` and a random generator. It returns the perturbed problem, whose
``prompt + solution`` still passes the problem's tests, or None where the prompt has nothing that it could change. To
add one, write a function and list it in ``PERTURBATIONS``.

The kinds, what each does and how often are ReCode's. The code is not, and it differs where ReCode's changes the task:

- ReCode's dice often leave a function's name as it was. Here at least one place changes, or the answer is None.
- In a docstring, prose changes: words of letters only, in lines that are no examples, outside quotation marks. White
  space comes and goes between words and inside them, not at line ends, where doctests would move.
- A function's new name is a name and is new. It replaces whole words, not every occurrence of the letters.
- Synonyms and forms of words come from the small tables in ``wording.py``.
- Format and syntax start from one layout of half a solution, ``partial``; ReCode lays it out with Black, and for the
  syntax only. Its dead code may be a copy of what is still to be written; here it is one of what is shown.
- Loops and operands change only where Python promises the same result. Arguments keep their names.

Left out: back-translation and CodeBERT's names for variables, which need a model, and while loops written as for loops,
which ReCode names but does not do for Python.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

from flabc.errors import UnknownNameError
from flabc.runtime.evaluate import rewrite, wording
from flabc.runtime.evaluate.wording import Edit, Propose, Span


@dataclass(frozen=True)
class CodeProblem:
    """What a perturbation takes and gives.

    Args:
        prompt: imports, helpers, signature and docstring, and of a ``partial`` problem the begin of the body.
        entry_point: the function's name.
        solution: a reference completion, what follows the prompt.
    """

    prompt: str
    entry_point: str
    solution: str

    @property
    def program(self) -> str:
        """Prompt and solution in one."""
        return self.prompt + self.solution


Perturb = Callable[[CodeProblem, Random], CodeProblem | None]

#: The probability of an empty line after a line of code, as in ReCode.
NEWLINE = 0.5
#: How often a name is drawn anew when the drawn one will not do.
TRIES = 8
#: Names that no function may get: Python's, and those of HumanEval's tests.
RESERVED = frozenset({"METADATA", "candidate", "check", *dir(builtins), *keyword.kwlist})
#: Words that are Python's in any docstring.
LITERALS = frozenset({"None", "True", "False", "bool", "dict", "float", "int", "list", "set", "str", "tuple"})


def on_name(propose: Propose) -> Perturb:
    """A perturbation of the function's name."""

    def perturbed(problem: CodeProblem, rng: Random) -> CodeProblem | None:
        name = problem.entry_point
        words = [match.span() for match in re.finditer(r"[A-Z]?[a-z]+|[A-Z]+", name)]
        taken = RESERVED | set(re.findall(r"\w+", problem.program))
        for _ in range(TRIES):
            edits = propose(name, words, rng)
            new = wording.carry_out(wording.draw(edits, rng), name) if edits else ""
            if new.isidentifier() and new not in taken:
                return renamed(problem, new)
        return None

    return perturbed


def on_docstring(propose: Propose) -> Perturb:
    """A perturbation of the words in the function's docstring."""

    def perturbed(problem: CodeProblem, rng: Random) -> CodeProblem | None:
        names = _names(problem)  # a synonym that an argument is called would point at it
        proposed = propose(problem.prompt, prose(problem), rng)
        return _edited(
            problem, [edit for edit in proposed if len(edit.text) < 3 or edit.text.strip() not in names], rng
        )

    return perturbed


def on_syntax(change: rewrite.Rewrite) -> Perturb:
    """A rewrite of the code in the prompt of a ``partial`` problem."""

    def perturbed(problem: CodeProblem, rng: Random) -> CodeProblem | None:
        made = rewrite.rewritten(problem.prompt, problem.solution, problem.entry_point, change, rng)
        return replace(problem, prompt=made[0], solution=made[1]) if made else None

    return perturbed


def doc_to_comments(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """The docstring as comments."""
    doc = _docstring(problem)
    before, after = (problem.prompt[: doc.start], problem.prompt[doc.end :]) if doc else ("", "")
    indent = before[before.rfind("\n") + 1 :]
    if doc is None or indent.strip() or after.partition("\n")[0].strip():
        return None
    lines = [line.removeprefix(indent).rstrip() for line in doc.text.strip(" ").split("\n")]
    comments = "\n".join(f"{indent}# {line}" if line else "" for line in lines).strip("\n")
    return replace(problem, prompt=before.removesuffix(indent) + comments + after)


def line_split(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """The longest line of the code in two, near the middle of its words."""
    start, code = _code(problem)
    unit = rewrite.indentation(problem.program, _entry(problem))
    lines = re.finditer(r"^([ \t]*)\S.*", code, re.MULTILINE)
    for line in sorted(lines, key=lambda line: -len("".join(line[0].split()))):
        gaps = [gap.span() for gap in re.finditer(r"(?<=\S) +(?=\S)", line[0])]
        for a, b in sorted(gaps, key=lambda gap: abs(gaps.index(gap) - (len(gaps) - 1) // 2)):
            at, after = start + line.start() + a, start + line.start() + b
            prompt = f"{problem.prompt[:at]} \\\n{line[1]}{unit}{problem.prompt[after:]}"
            if _same(problem, prompt):  # not so inside a string
                return replace(problem, prompt=prompt)
    return None


def newline_after_code(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """An empty line at the end of the prompt."""
    return replace(problem, prompt=f"{problem.prompt}\n")


def newline_after_doc(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """An empty line after the docstring."""
    doc = _docstring(problem)
    return replace(problem, prompt=f"{problem.prompt[: doc.end]}\n{problem.prompt[doc.end :]}") if doc else None


def newline_random(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """Empty lines between those of the code, and before and after them."""
    start, code = _code(problem)
    ends = [start, *(start + match.end() for match in re.finditer("\n", code))] if code.strip() else []
    ends = [at for at in ends if _same(problem, f"{problem.prompt[:at]}\n{problem.prompt[at:]}")]  # not inside a string
    return _edited(problem, [Edit(at, at, "\n", NEWLINE) for at in ends], rng)


def tabs(problem: CodeProblem, rng: Random) -> CodeProblem | None:
    """A tab per level of indentation, in the solution as well; spaces where there were tabs.

    A model has to go on with tabs: one that writes spaces mixes both, which Python refuses. ReCode counts that as a
    failure, for it runs what was written; so prompt and completion are to be joined as they are.
    """
    unit = rewrite.indentation(problem.program, _entry(problem))
    lines = rewrite.reindent(problem.program, unit, rewrite.UNIT if "\t" in unit else "\t").split("\n")
    at = problem.prompt.count("\n")
    other = replace(problem, prompt="\n".join([*lines[:at], ""]), solution="\n".join(lines[at:]))
    return other if _tree(other.program) else None  # not where a helper is indented in another way


PERTURBATIONS: dict[str, dict[str, Perturb]] = {
    "function_name": {
        "name_butter_finger": on_name(wording.butter_finger),
        "name_camel_case": on_name(wording.camel_case),
        "name_change_case": on_name(wording.change_case),
        "name_inflection": on_name(wording.inflection),
        "name_swap_characters": on_name(wording.swap_characters),
        "name_synonym": on_name(wording.synonym),
    },
    "docstring": {
        "doc_butter_finger": on_docstring(wording.butter_finger),
        "doc_change_case": on_docstring(wording.change_case),
        "doc_inflection": on_docstring(wording.inflection),
        "doc_swap_characters": on_docstring(wording.swap_characters),
        "doc_synonym": on_docstring(wording.synonym),
        "doc_synonym_insertion": on_docstring(wording.synonym_insertion),
        "doc_tense_future": on_docstring(wording.tense_future),
        "doc_tense_past": on_docstring(wording.tense_past),
        "doc_whitespace": on_docstring(wording.whitespace),
    },
    "format": {
        "format_doc_to_comments": doc_to_comments,
        "format_line_split": line_split,
        "format_newline_after_code": newline_after_code,
        "format_newline_after_doc": newline_after_doc,
        "format_newline_random": newline_random,
        "format_tabs": tabs,
    },
    "natural_generation": {
        "syntax_dead_code": on_syntax(rewrite.dead_code),
        "syntax_for_while": on_syntax(rewrite.for_while),
        "syntax_operand_swap": on_syntax(rewrite.operand_swap),
        "syntax_rename_naive": on_syntax(rewrite.rename_naive),
        "syntax_rename_random": on_syntax(rewrite.rename_random),
    },
}
#: Categories whose prompts hold half of the solution.
HALVED = frozenset({"format", "natural_generation"})
#: Kinds that draw nothing, so that one seed of them is all there is.
SEEDLESS = frozenset(
    {
        "name_camel_case",
        "doc_tense_future",
        "doc_tense_past",
        "format_doc_to_comments",
        "format_line_split",
        "format_newline_after_code",
        "format_newline_after_doc",
        "format_tabs",
        "syntax_for_while",
        "syntax_operand_swap",
        "syntax_rename_naive",
    }
)


def kinds(names: Iterable[str]) -> list[str]:
    """The kinds that names of kinds and of categories stand for, each once.

    Raises:
        UnknownNameError: if a name is neither.
    """
    known = {kind: [kind] for members in PERTURBATIONS.values() for kind in members}
    known |= {category: list(members) for category, members in PERTURBATIONS.items()}
    found: dict[str, None] = {}
    for name in names:
        if name not in known:
            raise UnknownNameError("perturbation", name, known)
        found |= dict.fromkeys(known[name])
    return list(found)


def category_of(kind: str) -> str:
    """The category that a kind belongs to.

    Raises:
        UnknownNameError: if there is no such kind.
    """
    categories = {kind: category for category, members in PERTURBATIONS.items() for kind in members}
    if kind not in categories:
        raise UnknownNameError("perturbation", kind, categories)
    return categories[kind]


def partial(problem: CodeProblem) -> CodeProblem:
    """The problem with the first half of its solution's lines in the prompt, rounded down as in ReCode.

    The solution is laid out as ``ast.unparse`` does it, so that one that was rewritten differs by the rewrite only.
    """
    head, lines = rewrite.layout(problem.program, problem.entry_point)
    half = len(lines) // 2
    shown, rest = ("".join(f"{line}\n" for line in part) for part in (lines[:half], lines[half:]))
    return replace(problem, prompt=head + shown, solution=rest)


def nominal(kind: str, problem: CodeProblem) -> CodeProblem:
    """What a kind perturbs and is compared with: the problem or, for format and syntax, its ``partial``."""
    return partial(problem) if category_of(kind) in HALVED else problem


def perturb(kind: str, problem: CodeProblem, seed: int) -> CodeProblem | None:
    """The ``nominal`` problem, perturbed: the same for the same seed, on every machine.

    Returns:
        None where the prompt has nothing that the kind could change.
    """
    change = PERTURBATIONS[category_of(kind)][kind]
    return change(nominal(kind, problem), Random(f"{seed} {kind} {problem.entry_point}"))


def check_call(problem: CodeProblem, perturbed: CodeProblem) -> str:
    """The line to run after HumanEval's test. A test may itself call the function, by a name that may be an old one."""
    old, new = problem.entry_point, perturbed.entry_point
    return f"check({new})\n" if old == new else f"{old} = {new}\ncheck({new})\n"


def renamed(problem: CodeProblem, new: str) -> CodeProblem:
    """The problem with another name for its function, in code, in examples and where prose speaks of it.

    Prose speaks of a function whose name is also a word, such as "common", only as "function common" or "common(".
    """
    old, doc = problem.entry_point, _docstring(problem)
    name = re.compile(rf"(?<![\w.]){old}(?!\w)")
    spoken = re.compile(rf"(?<=function ){old}(?!\w)|{name.pattern}(?=\()") if re.fullmatch("[a-z]+", old) else name
    start, end = (doc.start, doc.end) if doc else (0, 0)
    before, text, after = problem.prompt[:start], problem.prompt[start:end], problem.prompt[end:]
    return CodeProblem(
        prompt=name.sub(new, before) + spoken.sub(new, text) + name.sub(new, after),
        entry_point=new,
        solution=name.sub(new, problem.solution),
    )


def prose(problem: CodeProblem) -> list[Span]:
    """Where the words of a docstring's prose stand in the prompt.

    No words are: names of the program, literals, what is in quotation marks, anything with other characters than
    letters and hyphens, and lines that are examples.
    """
    names = _names(problem) | LITERALS
    found: list[Span] = []
    for at, line in _prose_lines(problem):
        bare = re.sub(r"(?<!\w)([\"'`]).*?['\"`](?!\w)", lambda match: "\0" * len(match[0]), line)
        words = re.finditer(r"(?<![^\s(])[A-Za-z]+(?:-[A-Za-z]+)*(?=[.,;:!?)]*(?:\s|$))", bare)
        found += [(at + m.start(), at + m.end()) for m in words if m[0] not in names and m[0][1:].islower()]
    return found


def _prose_lines(problem: CodeProblem) -> Iterator[tuple[int, str]]:
    """The docstring's lines, but not doctests with their outputs, which end at an empty line, nor other examples."""
    doc = _docstring(problem)
    at, example = doc.inner if doc else 0, False
    for line in doc.text.split("\n") if doc else ():
        text = line.strip()
        example = text.startswith(">>>") or (example and bool(text))
        if not example and not re.search(r"[=➞→⇒]|->", text) and not text.startswith(f"{problem.entry_point}("):
            yield at, line
        at += len(line) + 1


class _Doc(NamedTuple):
    """A docstring in a prompt: its literal is ``[start, end)``; ``text``, between the quotes, begins at ``inner``."""

    start: int
    end: int
    inner: int
    text: str


def _docstring(problem: CodeProblem) -> _Doc | None:
    node = rewrite.docstring(_entry(problem))
    if node is None:
        return None
    lines = problem.prompt.split("\n")
    start = _offset(lines, node.lineno, node.col_offset)
    end = _offset(lines, node.end_lineno or 0, node.end_col_offset or 0)
    parts = re.fullmatch(r"""(\w*("{3}|'{3}|"|'))(.*)\2""", problem.prompt[start:end], re.DOTALL)
    return _Doc(start, end, start + len(parts[1]), parts[3]) if parts else None


def _offset(lines: list[str], row: int, column: int) -> int:
    """Where a node begins in a text: syntax trees count columns in bytes."""
    return sum(len(line) + 1 for line in lines[: row - 1]) + len(lines[row - 1].encode()[:column].decode())


def _entry(problem: CodeProblem) -> ast.FunctionDef:
    return rewrite.entry(rewrite.parse(problem.program), problem.entry_point)


def _code(problem: CodeProblem) -> tuple[int, str]:
    """Where the code after the docstring begins in the prompt, and that code."""
    doc = _docstring(problem)
    code = problem.prompt[doc.end :].partition("\n")[2] if doc else ""
    return len(problem.prompt) - len(code), code


def _names(problem: CodeProblem) -> set[str]:
    """What the code of the prompt names: functions, arguments, types, modules."""
    doc = _docstring(problem)
    code = problem.prompt[: doc.start] + problem.prompt[doc.end :] if doc else problem.prompt
    return set(re.findall(r"[^\W\d]\w*", code)) - {*keyword.kwlist}


def _edited(problem: CodeProblem, edits: list[Edit], rng: Random) -> CodeProblem | None:
    """The problem after some of the edits of its prompt."""
    return replace(problem, prompt=wording.carry_out(wording.draw(edits, rng), problem.prompt)) if edits else None


def _tree(program: str) -> str | None:
    """What Python makes of a program: text that is equal for equal syntax trees, None where there is no tree."""
    try:
        return ast.dump(rewrite.parse(program))
    except SyntaxError:
        return None


def _same(problem: CodeProblem, prompt: str) -> bool:
    """Is the program the same with another prompt?"""
    return _tree(prompt + problem.solution) == _tree(problem.program)
