"""What a run leaves behind: one line of JSON per answer, written as soon as it is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, Field, ValidationError

from flabc.frozen import Frozen

T = TypeVar("T", bound=BaseModel)

#: Where a run keeps its records while it is not finished.
RECORDS = "records.jsonl"


class Completion(Frozen):
    """An answer that is not graded yet.

    Args:
        task_id: the problem.
        sample: which of its answers.
        text: what the model said; of a chat answer all of it.
        tokens: tokens produced, the last one included; None if a server did not say.
        finish_reason: ``stop``, ``length``, or ``refused`` if the prompt left no room.
    """

    task_id: str
    sample: int = 0
    text: str
    tokens: int | None = None
    finish_reason: str = "stop"


class Record(Frozen):
    """One observation.

    Args:
        task_id: the problem or document.
        unit: what statistics count as one; records that share it are not independent.
        kind: the row of the results that it counts in.
        sample: which answer to the problem.
        score: 1 right, 0 wrong; None where ``numbers`` say it all.
        prompt, completion: what was asked and answered.
        detail: why it was wrong.
        numbers: sums that perplexity and kl are made of.
    """

    task_id: str
    unit: str
    kind: str = ""
    sample: int = 0
    score: float | None = None
    prompt: str = ""
    completion: str = ""
    detail: str = ""
    numbers: dict[str, float] = Field({})


class Journal(Generic[T]):
    """A file of JSON lines that survives being killed: what is complete is read again, half a line is dropped."""

    def __init__(self, file: Path, model: type[T]) -> None:
        self.file = file
        self.rows = read(file, model) if file.is_file() else []
        if file.is_file():  # without the half line that a kill may have left
            file.write_text("".join(row.model_dump_json() + "\n" for row in self.rows), encoding="utf-8")

    def append(self, row: T) -> None:
        """Keep a row; it is on disk when this returns."""
        self.rows.append(row)
        with self.file.open("a", encoding="utf-8") as out:
            out.write(row.model_dump_json() + "\n")


def read(file: Path, model: type[T]) -> list[T]:
    """The rows of a file of JSON lines; a last line that is cut off is left out."""
    rows = []
    lines = file.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines):
        try:
            if line:
                rows.append(model.model_validate(json.loads(line)))
        except (json.JSONDecodeError, ValidationError):
            if number < len(lines) - 1:
                raise
    return rows
