from __future__ import annotations

from pathlib import Path

import pytest

from flabc.commands.bench import bench
from flabc.errors import RecipeError, UnknownNameError
from flabc.perf import suite
from flabc.perf.duration import seconds


@pytest.mark.parametrize("name", suite.shipped())
def test_shipped_suites_are_options_of_the_command_and_in_its_help(name: str) -> None:
    loaded = suite.load(name)
    assert loaded.description
    options = {parameter.name for parameter in bench.params}
    assert loaded.options().keys() <= options
    assert set(suite.Suite.model_fields) - {"description"} <= options
    assert bench.help is not None
    assert name in bench.help


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("prompt_tokns: [1]", "Did you mean 'prompt_tokens'"),
        ("prompt_tokens: []", "prompt_tokens"),
        ("batch: [0]", "batch"),
        ("output_tokens: 1", "output_tokens"),
        ("concurrency: [0]", "concurrency"),
        ("arrival_rate: [.inf]", "arrival_rate"),
        ("requests: 1", "requests"),
    ],
)
def test_what_is_wrong_is_named(content: str, found: str, tmp_path: Path) -> None:
    (file := tmp_path / "mine.yaml").write_text(content + "\n")
    with pytest.raises(RecipeError, match=found):
        suite.load(str(file))


def test_an_unknown_suite_gets_a_guess() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'serving'"):
        suite.load("servin")


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("0s", 0)])
def test_times_are_read(text: str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("wrong", ["10", "-1m", "1d", "", "m", "1 m"])
def test_what_is_no_time_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="is no time"):
        seconds(wrong)
