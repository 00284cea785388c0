"""A problem: what a model is asked, and how its answer is graded."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any

#: What has to stand before everything else.
_FUTURE = re.compile(r"^from __future__ import [^(\n]+\n", re.MULTILINE)

_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Program:
    """Graded by running: the answer between what stands before and behind it must run to its end.

    Args:
        before: code that stands before a completion.
        after: the tests.
        context: code that stands before the whole code that a chat model answers with.
    """

    before: str
    after: str
    context: str = ""

    def continued(self, completion: str) -> str:
        """The program to run, of a completion."""
        return f"{self.before}{completion}\n{self.after}"

    def answered(self, code: str) -> str:
        """The program to run, of the code in a chat answer."""
        program = f"{self.context}\n{code}\n{self.after}"
        future = dict.fromkeys(_FUTURE.findall(f"{self.context}\n{code}\n"))
        return "".join(future) + _FUTURE.sub("", program) if future else program


@dataclass(frozen=True)
class Value:
    """Graded by comparing: the answer must be a literal equal to ``expected``, which is Python source."""

    expected: str

    def matches(self, answer: str) -> bool:
        """Whether the answer is the value; what is no literal is wrong."""
        try:
            return bool(literal(answer) == ast.literal_eval(self.expected))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False


@dataclass(frozen=True)
class Problem:
    """One question.

    Args:
        task_id: the question's name, unique in its task.
        prompt: the text that a model continues.
        instruction: what a chat model is asked instead.
        stop: texts that end a completion.
        grading: how the answer is graded.
        group: questions that share it are not independent; by default each stands alone.
        kind: the row of the results that it counts in.
    """

    task_id: str
    prompt: str
    instruction: str
    stop: tuple[str, ...]
    grading: Program | Value
    group: str = ""
    kind: str = ""

    @property
    def unit(self) -> str:
        """What statistics count as one observation."""
        return self.group or self.task_id


def chat_code(answer: str) -> str:
    """The code of a chat answer: its first fenced block, or all of it if there is none."""
    found = _FENCE.search(answer)
    return found.group(1) if found else answer


def literal(answer: str) -> Any:
    """The value that an answer to ``assert f(x) ==`` states; a comment or a message behind it is no part of it.

    Raises:
        ValueError, SyntaxError: if it is no literal.
    """
    lines = answer.strip().splitlines() or [""]
    statement = ast.parse(f"assert _ == {lines[0]}").body[0]
    if not isinstance(statement, ast.Assert) or not isinstance(statement.test, ast.Compare):
        raise ValueError("no comparison")
    if len(statement.test.comparators) != 1:
        raise ValueError("a chain of comparisons")
    return ast.literal_eval(statement.test.comparators[0])
