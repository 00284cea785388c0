"""MBPP (Austin et al., 2021): short functions asked for in words, graded by three assertions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flabc.errors import CorpusError
from flabc.runtime.evaluate.problem import Problem, Program
from flabc.runtime.evaluate.source import field, read_jsonl

#: As bigcode-evaluation-harness publishes them.
STOP = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")

#: The ids of the test split, as the paper cuts the full file; the sanitised one has fewer of them.
TEST = range(11, 511)


def problems(source: Path | None, choices: Sequence[str] = ()) -> list[Problem]:
    """The test split of ``mbpp.jsonl`` or ``sanitized-mbpp.json``.

    The prompt is bigcode-evaluation-harness's: the words and the first assertion in a docstring.

    Raises:
        CorpusError: if no file is given, or it is no such file.
    """
    if source is None:
        raise CorpusError("The task mbpp needs its file.", fix="Give --data mbpp.jsonl.")
    found = []
    for row in read_jsonl(source):
        number = int(field(row, "task_id"))
        if number not in TEST:
            continue
        asked, tests = field(row, "text", "prompt"), field(row, "test_list")
        setup = "\n".join([*row.get("test_imports", []), row.get("test_setup_code", ""), ""]).lstrip("\n")
        found.append(
            Problem(
                task_id=f"MBPP/{number}",
                prompt=f'"""\n{asked}\n{tests[0]}\n"""\n',
                instruction=f"{asked}\nYour code should pass this test:\n```python\n{tests[0]}\n```\n"
                "Answer with one code block.",
                stop=STOP,
                grading=Program(before=setup, after="\n".join(tests), context=setup),
            )
        )
    if not found:
        raise CorpusError(f"{source} holds none of the problems {TEST.start} to {TEST.stop - 1} of MBPP's test split.")
    return found
