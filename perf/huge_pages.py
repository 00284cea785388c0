"""What huge pages are worth: one engine opened with and without, in turns, each time in a process of its own.

    python perf/huge_pages.py ENGINE [ENGINE ...] --rounds 5

Writes ``perf/results/huge-pages.json``: milliseconds to open the engine, of a prompt and of each token after it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from flabc import artifact
from flabc.compress.data import corpus
from flabc.perf.estimates import median, median_ratio, median_ratio_interval
from flabc.runtime import huge_pages
from flabc.runtime.backend import Limits
from flabc.runtime.measure.environment import environment
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

RESULT = Path(__file__).resolve().parent / "results" / "huge-pages.json"

PROMPT, ANSWER = 256, 48


def timed(engine: str) -> dict[str, float]:
    """Open an engine and let it answer twice; times of the second answer, in milliseconds."""
    began = time.perf_counter()
    session = Session.open(engine, limits=Limits(max_length=PROMPT + ANSWER, threads=os.cpu_count()))
    opened = time.perf_counter() - began
    (text,) = corpus.prompts("python-stdlib", PROMPT, 1)
    ids = session.codec.encode_plain(text)[:PROMPT]
    for _ in range(2):
        marks = [time.perf_counter()]
        marks += [time.perf_counter() for _ in session.tokens(ids, SamplingParams(max_tokens=ANSWER, ignore_eos=True))]
    first, *later = (1000 * (b - a) for a, b in pairwise(marks))
    return {"open_ms": 1000 * opened, "prompt_ms": first, "token_ms": median(later)}


def asked(engine: str, *, huge: bool) -> dict[str, float]:
    """As ``timed``, in a new process."""
    command = [sys.executable, __file__, engine, "--alone", *([] if huge else ["--without"])]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def main() -> None:
    """Measure, and write how many times as fast it is with huge pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        if options.without:
            huge_pages.LEAST = sys.maxsize
        print(json.dumps(timed(options.engines[0])))
        return
    if not huge_pages.allowed():
        parser.error("this system gives no huge pages")
    rows = {}
    for engine in options.engines:
        sides: dict[bool, list[dict[str, float]]] = {True: [], False: []}
        for turn in range(options.rounds):
            for huge in (turn % 2 == 0, turn % 2 == 1):
                sides[huge].append(asked(engine, huge=huge))
        rows[Path(engine).name] = {
            key: {
                "with": [round(run[key], 2) for run in sides[True]],
                "without": [round(run[key], 2) for run in sides[False]],
                "times_as_fast": round(median_ratio(*both), 3),
                "interval": [round(end, 3) for end in median_ratio_interval(*both)],
            }
            for key in ("open_ms", "prompt_ms", "token_ms")
            for both in [([run[key] for run in sides[False]], [run[key] for run in sides[True]])]
        }
    artifact.write_whole(RESULT, json.dumps({"environment": environment(), "engines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
