from __future__ import annotations

import pytest

from flabc.errors import FlabcError, MissingExtraError, UnknownNameError, require


def test_a_message_says_expected_found_and_what_to_do() -> None:
    error = FlabcError("The cup is empty.", expected="tea", found="air", fix="Pour some.")
    assert str(error) == "The cup is empty. Expected: tea. Found: air. Pour some."


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    message = str(UnknownNameError("recipe", "flab22", ["flab-22", "other"]))
    assert "Did you mean 'flab-22'?" in message
    assert "Known: flab-22, other." in message


def test_a_name_that_resembles_nothing_gets_no_guess() -> None:
    assert "Did you mean" not in str(UnknownNameError("recipe", "zzzz", ["flab-22"]))


def test_a_missing_package_names_the_pip_command() -> None:
    with pytest.raises(MissingExtraError, match=r"pip install 'flabc\[cpu\]'"):
        require("no_such_package_at_all.part", "cpu")


def test_a_package_that_is_there_is_imported() -> None:
    assert require("json", "cpu").dumps([1]) == "[1]"
