"""The tests of mined tasks: code that stands behind a function and fails by raising."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Names that examples of these packages read without importing them, as their own documents say.
ALIASES = {"np": "numpy", "nx": "networkx", "pd": "pandas", "sp": "scipy", "torch": "torch", "sympy": "sympy"}

#: Puts a function in the place of the package's own, which every module of the package may hold under some name.
_IN_PLACE = """
def _put_in_place(new):
    import importlib
    import sys

    module = importlib.import_module({module!r})
    old = vars(module)[{name!r}]
    for each in list(sys.modules.values()):
        for key, value in list(getattr(each, "__dict__", {{}}).items()):
            if value is old:
                setattr(each, key, new)
    return dict(vars(module))


"""

_EXAMPLES = """
def _check_examples(known):
    import doctest

    told = []
    examples = doctest.DocTestParser().get_doctest(_EXAMPLES, known, {name!r}, None, 0)
    failed = doctest.DocTestRunner(verbose=False{flags}).run(examples, out=told.append).failed
    assert not failed, "".join(told)[-300:]


_EXAMPLES = {examples}
_check_examples({known})
"""

_TESTS = """
def _check_tests(tests):
    import importlib
    import unittest

    for module, names in tests:
        found = importlib.import_module(module)
        for owner, _, name in (each.rpartition(".") for each in names):
            kind = getattr(found, owner) if owner else None
            if kind is not None and issubclass(kind, unittest.TestCase):
                result = unittest.TestResult()
                unittest.TestSuite([kind(name)]).run(result)
                problems = [text for _, text in (*result.errors, *result.failures, *result.skipped)]
                assert result.testsRun and result.wasSuccessful() and not problems, "".join(problems)[-300:]
            else:
                getattr(kind() if kind else found, name)()


{place}
_check_tests({tests})
"""


def of_examples(name: str, examples: str, module: str = "", aliases: Mapping[str, str] | None = None) -> str:
    """A test of doctests.

    Args:
        name: the function.
        examples: the doctests.
        module: the module that the function is put into; empty if it stands for itself. Its examples then see what
            it holds, and may leave out and wrap what doctest lets them, which packages set for themselves.
        aliases: modules by the names that the examples know them under.
    """
    if not module:
        return _EXAMPLES.format(name=name, examples=repr(examples), flags="", known="dict(globals())")
    imports = "".join(f"import {each} as {alias}\n" for alias, each in sorted((aliases or {}).items()))
    known = f"{{**globals(), **_put_in_place({name})}}"
    flags = ", optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS"
    checked = _EXAMPLES.format(name=name, examples=repr(examples), flags=flags, known=known)
    return imports + _IN_PLACE.format(module=module, name=name) + checked.lstrip("\n")


def of_tests(name: str, module: str, tests: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """A test of a package's own tests.

    Args:
        name: the function.
        module: the module that it is put into.
        tests: modules, and the tests of each.
    """
    place = _IN_PLACE.format(module=module, name=name)
    return place + _TESTS.format(place=f"_put_in_place({name})", tests=repr(list(tests))).lstrip("\n")
