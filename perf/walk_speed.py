"""What sharing prefixes saves: one walk over many variants against one forward pass for each.

    python perf/walk_speed.py smollm2-135m

Writes ``perf/results/walk.json``. Both sides compute the same hidden states on the same tokens; which goes first
alternates from round to round.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from flabc.compress import load
from flabc.compress.devices import compute_dtype
from flabc.compress.walk import GONE, Decision, Variant, Walk, dense_variant, steps_of, without
from flabc.runtime.measure.environment import environment

RESULT = Path(__file__).resolve().parent / "results" / "walk.json"


def main() -> None:
    """Time both, and write the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = load.load(asked.model)
    tokens = torch.randint(0, model.spec.vocab_size, (asked.sequences, asked.length))
    device = torch.device("cpu")
    walk = Walk(model, tokens, device, compute_dtype(device))
    dense = dense_variant(model.spec)
    cases = {
        "leave one layer out": [dense, *(without(dense, layer) for layer in range(len(dense)))],
        "32 offspring of one parent": offspring(dense, 32),
    }
    found = {name: compare(walk, variants, asked.rounds) for name, variants in cases.items()}
    about = {"model": asked.model, "sequences": asked.sequences, "length": asked.length}
    RESULT.write_text(json.dumps({"environment": environment(), **about, "cases": found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def offspring(dense: Variant, count: int) -> list[Variant]:
    """Children that differ from a parent, which lacks two layers, in one to three layers, as a search makes them."""
    draw = random.Random(0)
    parent = without(without(dense, len(dense) // 2), len(dense) // 3)
    children = []
    for _ in range(count):
        child = parent
        for layer in draw.sample(range(len(dense)), draw.randint(1, 3)):
            child = without(
                child, layer, draw.choice([GONE, Decision(attention=False), Decision(ffn=False), Decision()])
            )
        children.append(child)
    return children


def compare(walk: Walk, variants: Sequence[Variant], rounds: int) -> dict[str, Any]:
    """Seconds of one walk and of one for each variant, and what the trie foretells."""
    ways: dict[str, Callable[[], Any]] = {
        "one_walk_s": lambda: walk.run(variants),
        "each_alone_s": lambda: [walk.run([variant]) for variant in variants],
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    for at in range(rounds):
        for name in list(ways)[:: 1 if at % 2 else -1]:
            started = time.monotonic()
            ways[name]()
            samples[name].append(time.monotonic() - started)
    ratios = [alone / one for one, alone in zip(samples["one_walk_s"], samples["each_alone_s"], strict=True)]
    alone_steps = sum(sum(steps_of([variant])) for variant in variants)
    return {
        **samples,
        "ratio": round(median(ratios), 3),
        "foretold_ratio": round(alone_steps / sum(steps_of(list(dict.fromkeys(variants)))), 3),
    }


if __name__ == "__main__":
    main()
