"""Task files: JSON lines, plain or gzipped, or a JSON list."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from flabc.errors import CorpusError


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a file.

    Raises:
        CorpusError: if it cannot be read, holds no row, or a line is no JSON object; the line is named.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = raw.decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # gzip's own errors are among these
        raise CorpusError(f"The task file {file} cannot be read: {error}") from error
    found = [_parse(file, 1, text)] if text.lstrip().startswith("[") else _lines(file, text)
    rows = found[0] if found and isinstance(found[0], list) else found
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise CorpusError(f"The task file {file} holds no problems.", expected="one JSON object per line")
    return list(rows)


def field(row: dict[str, Any], *names: str) -> Any:
    """The first of these fields that a row has.

    Raises:
        CorpusError: if it has none of them.
    """
    for name in names:
        if name in row:
            return row[name]
    raise CorpusError(
        f"A problem of the task file has no {names[0]!r}.",
        expected=f"a field {' or '.join(map(repr, names))}",
        found=", ".join(row) or "an empty object",
    )


def _lines(file: Path, text: str) -> list[Any]:
    return [_parse(file, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _parse(file: Path, line: int, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{file}, line {line} is no JSON: {error}") from error
