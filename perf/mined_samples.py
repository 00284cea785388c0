"""Draws the samples that docs/mined-tasks.md shows, from a file that ``flabc data mine`` wrote.

    python perf/mined_samples.py tasks.jsonl
    python docs/generate.py

Only tasks of the standard library and of packages under MIT, BSD or Apache licences are drawn, by a fixed seed.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SAMPLES = Path(__file__).resolve().parent / "results" / "mined-samples.json"

SEED, COUNT = 0, 20

#: Whole licences that are printed: what an expression adds to them, it may not be printed under.
PERMISSIVE = re.compile(
    r"(PSF-2\.0|MIT|MIT License|The MIT License|(3-Clause )?BSD( License|-\d-Clause)?|new BSD"
    r"|Apache([- ]2(\.0)?)?( License)?|Apache License,? (Version )?2\.0)",
    re.IGNORECASE,
)

KEPT = ("task_id", "project", "licence", "split", "tested_by", "imports")

#: Characters that are quoted of what a function says it does.
QUOTED = 200


def sample(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows drawn at random: what each asks for, and the length of its solution; the code itself is its project's."""
    printable = sorted(
        (row for row in rows if PERMISSIVE.fullmatch(str(row["licence"]).strip())), key=lambda row: str(row["task_id"])
    )
    chosen = random.Random(SEED).sample(printable, min(COUNT, len(printable)))
    return [{name: row[name] for name in KEPT} | _said(row) for row in chosen]


def _said(row: Mapping[str, Any]) -> dict[str, Any]:
    """A task's signature, the beginning of its docstring, and the lines of its solution."""
    tree, name = ast.parse(row["prompt"] + row["canonical_solution"]), row["entry_point"]
    function = next(each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name == name)
    paragraph = " ".join((ast.get_docstring(function) or "").split("\n\n")[0].split())
    return {
        "signature": f"{name}({ast.unparse(function.args)})",
        "asks": paragraph if len(paragraph) <= QUOTED else f"{paragraph[:QUOTED]}…",
        "solution_lines": len(row["canonical_solution"].splitlines()),
    }


def as_markdown(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> str:
    """The page."""
    steps = "\n".join(f"| {step} | {count:,} |" for step, count in counts["counts"].items())
    parts = [
        "# Mined tasks",
        "",
        f"What `flabc data mine {' '.join(counts['sources'])}` made of one environment, step by step (a project that "
        "gave no task is counted and not named):",
        "",
        f"| step | left |\n| --- | ---: |\n{steps}",
        "",
        *[
            f"By {title}: {', '.join(f'{name} {count:,}' for name, count in counts[key].items())}.\n"
            for key, title in (("tested_by", "test"), ("needs", "what has to be installed"), ("splits", "side"))
        ],
        f"{len(rows)} of them, drawn at random (`perf/mined_samples.py`, seed {SEED}) from those of the standard "
        "library and of packages under MIT, BSD or Apache licences: what they ask for. Prompts, solutions and tests "
        "are in the file that the command writes; they are the projects', under their licences.",
        "",
        "| task | asks for | licence | solution | tested by |",
        "| --- | --- | --- | ---: | --- |",
    ]
    for row in rows:
        asks = f"`{row['signature']}`: {row['asks']}".replace("|", "\\|")
        cells = (row["task_id"], asks, row["licence"], f"{row['solution_lines']} lines", row["tested_by"])
        parts.append(f"| {' | '.join(cells)} |")
    parts.append("")
    return "\n".join(parts)


def main(file: str) -> None:
    """Draw from a file."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    SAMPLES.write_text(json.dumps(sample(rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
