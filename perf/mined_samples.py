"""Draws the samples that docs/mined-tasks.md shows, from a file that ``flabc data mine`` wrote.

    python perf/mined_samples.py tasks.jsonl
    python docs/generate.py

Only tasks of the standard library and of packages under MIT, BSD or Apache licences are drawn, by a fixed seed.
"""

from __future__ import annotations

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

KEPT = ("task_id", "project", "licence", "split", "tested_by", "imports", "prompt", "canonical_solution")


def sample(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows drawn at random, without their tests."""
    printable = sorted(
        (row for row in rows if PERMISSIVE.fullmatch(str(row["licence"]).strip())), key=lambda row: str(row["task_id"])
    )
    chosen = random.Random(SEED).sample(printable, min(COUNT, len(printable)))
    return [{name: row[name] for name in KEPT} for row in chosen]


def as_markdown(rows: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> str:
    """The page."""
    steps = "\n".join(f"| {step} | {count:,} |" for step, count in counts["counts"].items())
    parts = [
        "# Mined tasks",
        "",
        "What `flabc data mine python-stdlib python-packages` made of one environment, step by step:",
        "",
        f"| step | left |\n| --- | ---: |\n{steps}",
        "",
        *[
            f"By {title}: {', '.join(f'{name} {count:,}' for name, count in counts[key].items())}.\n"
            for key, title in (("tested_by", "test"), ("needs", "what has to be installed"), ("splits", "side"))
        ],
        f"{len(rows)} of them, drawn at random (`perf/mined_samples.py`, seed {SEED}) from those of the standard "
        "library and of packages under MIT, BSD or Apache licences. The code is the projects', under their licences.",
        "",
    ]
    for row in rows:
        needs = f"; imports {', '.join(f'`{name}`' for name in row['imports'])}" if row["imports"] else ""
        code = f"{row['prompt']}{row['canonical_solution']}".rstrip()
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code) or [""]))
        parts += [
            f"## {row['task_id']}",
            "",
            f"{row['project']}, {row['licence']}; {row['split']}; tested by {row['tested_by']}{needs}.",
            "",
            f"{fence}python\n{code}\n{fence}",
            "",
        ]
    return "\n".join(parts)


def main(file: str) -> None:
    """Draw from a file."""
    rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    SAMPLES.write_text(json.dumps(sample(rows), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
