"""The journal: every evaluation in an SQLite file, written as it finishes.

A search that was cut off runs again from its beginning; what the journal knows is not measured again. Since operators
depend on nothing but their seed and what was measured, it comes to where it was, and goes on.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flabc.errors import ArtifactError, UsageError

from .genome import Decoded, Genome

_TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS candidates (
    number INTEGER PRIMARY KEY, genome TEXT NOT NULL UNIQUE, origin TEXT NOT NULL, repair TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS evaluations (
    genome TEXT NOT NULL, rung INTEGER NOT NULL, kl REAL NOT NULL, PRIMARY KEY (genome, rung)
);
CREATE TABLE IF NOT EXISTS replies (
    number INTEGER PRIMARY KEY, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS gave_up (number INTEGER PRIMARY KEY);
"""


@dataclass(frozen=True)
class Reply:
    """What a language model said, and the tokens that it took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """An open journal.

    Args:
        file: the SQLite file; made if it is not there.

    Raises:
        ArtifactError: if the file is no journal.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._connection = sqlite3.connect(file)
        try:
            self._connection.executescript(_TABLES)
        except sqlite3.DatabaseError as error:
            raise ArtifactError(f"{file} is not a journal of a search: {error}.") from error
        rows = self._connection.execute("SELECT genome, rung, kl FROM evaluations").fetchall()
        self.known: dict[tuple[Genome, int], float] = {(Genome.parse(key), rung): kl for key, rung, kl in rows}
        rows = self._connection.execute("SELECT number, text, prompt_tokens, completion_tokens FROM replies").fetchall()
        self.replies: dict[int, Reply] = {number: Reply(*rest) for number, *rest in rows}
        self.gave_up = bool(self._connection.execute("SELECT 1 FROM gave_up").fetchone())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Note what the search depends on, or compare it with what was noted.

        Raises:
            UsageError: if something differs; it is named.
        """
        noted = {name: json.loads(text) for name, text in self._connection.execute("SELECT name, value FROM settings")}
        given = json.loads(json.dumps(settings))
        differs = [name for name in sorted(given.keys() | noted.keys()) if given.get(name) != noted.get(name)]
        if noted and differs:
            raise UsageError(
                f"The journal {self.file} is of another search: {', '.join(differs)} differ.",
                expected="; ".join(f"{name} {noted.get(name)!r}" for name in differs)[:500],
                found="; ".join(f"{name} {given.get(name)!r}" for name in differs)[:500],
                fix="Give what it was begun with, or another output folder.",
            )
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO settings VALUES (?, ?)",
                [(name, json.dumps(value)) for name, value in given.items()],
            )

    def propose(self, candidates: Iterable[tuple[Decoded, str]]) -> None:
        """Note genomes in their order, where they come from, and how they were repaired."""
        with self._connection:
            self._connection.executemany(
                "INSERT OR IGNORE INTO candidates (genome, origin, repair) VALUES (?, ?, ?)",
                [(decoded.genome.key, origin, decoded.repaired) for decoded, origin in candidates],
            )

    def record(self, rung: int, costs: Mapping[Genome, float]) -> None:
        """Note what was measured; when this returns, it is on the disk."""
        with self._connection:
            self._connection.executemany(
                "INSERT INTO evaluations VALUES (?, ?, ?)", [(genome.key, rung, kl) for genome, kl in costs.items()]
            )
        self.known |= {(genome, rung): kl for genome, kl in costs.items()}

    def candidates(self) -> list[tuple[Genome, str, str]]:
        """All genomes in the order in which they were proposed: genome, origin, repair."""
        rows = self._connection.execute("SELECT genome, origin, repair FROM candidates ORDER BY number")
        return [(Genome.parse(key), origin, repair) for key, origin, repair in rows]

    def hear(self, number: int, reply: Reply) -> None:
        """Note what a language model said, so that it is not asked again."""
        with self._connection:
            self._connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", (number, *vars(reply).values()))
        self.replies[number] = reply

    def give_up(self) -> None:
        """Note that the language model has failed for good."""
        with self._connection:
            self._connection.execute("INSERT OR IGNORE INTO gave_up VALUES (1)")
        self.gave_up = True
