"""What a cut model keeps of the tokens that may begin a text, fitted to texts alone or to many first tokens too.

    python perf/first_tokens.py qwen2.5-coder-0.5b.gguf --tie

A quarter of every FFN goes; then the whole is restored. Each model is compared with the dense one on windows of the
calibration corpora that it did not hear: as they are, behind a line break, and behind the opening of a chat. And on
tokens that stand alone: whether the state that the dense model makes of a first token is still there. What is in the
result already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flabc import artifact
from flabc.compress import load, pipeline
from flabc.compress.config import Calibration
from flabc.compress.criteria import kl
from flabc.compress.model import CausalLM
from flabc.compress.stage import Context, encoder, openings, sequences
from flabc.compress.walk import Walk, dense_variant
from flabc.perf.methods import CALIBRATION, FIRST_TOKENS, RESULTS
from flabc.recipe import parse
from flabc.runtime.measure.environment import environment

#: How channels are cut.
CUT = {"stage": "widths", "score": "obs", "restore": False, "multiple_of": 1, "rate": 0.25}

#: Windows that are listened to, and those behind them that models are compared on.
SEQUENCES, COMPARED = 32, 8

#: What is heard, and as many tokens more, as a share, each as the first of a text: none, or what recipes do by default.
HEARD = {"texts": 0.0, "first-tokens": FIRST_TOKENS}

#: Tokens that stand alone; the state of one is lost that is further from the dense one than this share of its square.
ALONE, LOST = 1000, 0.5


def main() -> None:
    """Cut, restore and compare what is missing, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever `flabc compress` takes as a model")
    parser.add_argument("--tie", action="store_true", help="as for `flabc compress`")
    parser.add_argument("--name", default="qwen2.5-coder-0.5b", help="the model's name in the result")
    asked = parser.parse_args()
    dense = load.load(asked.model, tie=asked.tie)
    file = RESULTS / f"{asked.name}.first-tokens.json"
    cells: dict[str, Any] = json.loads(file.read_text())["cells"] if file.is_file() else {}
    text = pipeline.text_of(dense, Calibration.model_validate(CALIBRATION), "cpu", 0)
    for key, share in HEARD.items():
        if key not in cells:
            calibration = {**CALIBRATION, "sequences": SEQUENCES, "first_tokens": share}
            context = pipeline.context_of(dense, None, Calibration.model_validate(calibration), "cpu", 0, text)
            cells[key] = measured(dense, context)
            content = {"environment": environment(), "cells": cells}
            artifact.write_whole(file, json.dumps(content, indent=1) + "\n")
            print(key, cells[key], flush=True)


def measured(dense: CausalLM, context: Context) -> dict[str, dict[str, float]]:
    """How far a cut model is from the dense one, before and after it is restored."""
    recipe = parse({"name": "narrowed", "stages": [CUT, {"stage": "restore"}]}, "narrowed")
    model, found = dense, dict[str, dict[str, float]]()
    for name, stage in zip(("cut", "restored"), recipe.stages, strict=True):
        model, _ = pipeline.run_stages(model, [stage], context)
        found[name] = distances(model, context)
    return found


def distances(model: CausalLM, context: Context) -> dict[str, float]:
    """KL to the dense model per token behind each beginning, in nats, and the share of first tokens that are lost."""
    behind = {name: round(kl_to_dense(model, context, before), 4) for name, before in beginnings(context).items()}
    return {**behind, "lost": lost(model, context)}


def beginnings(context: Context) -> dict[str, list[int]]:
    """What windows are put behind."""
    line_break = encoder(context.dense.tokenizer).encode("\n", add_special_tokens=False).ids
    return {"nothing": [], "line_break": line_break, "chat": openings(context.dense)[-1]}


def kl_to_dense(model: CausalLM, context: Context, before: Sequence[int]) -> float:
    """KL(dense || model) in nats per token, on windows that the model did not hear."""
    tokens = compared(context)
    tokens = torch.cat([torch.tensor(before, dtype=tokens.dtype).expand(len(tokens), -1), tokens], dim=1)
    variant = dense_variant(model.spec)
    own, theirs = (_hidden(each, context, tokens) for each in (model, context.dense))
    walk = Walk(model, tokens, context.device, context.dtype)
    return walk.costs(theirs, {variant: own}, kl)[variant]


def compared(context: Context) -> Tensor:
    """Windows of the calibration corpora behind those that are listened to, (COMPARED, T)."""
    heard, length = context.calibration.sequences, context.calibration.sequence_length
    tokenizer = encoder(context.dense.tokenizer)
    return sequences(tokenizer, context.documents, heard + COMPARED, length, context.seed)[heard:]


def lost(model: CausalLM, context: Context) -> float:
    """Of tokens drawn evenly that each stand alone, the share whose state in the middle of the model is lost."""
    drawn = np.random.default_rng(context.seed).choice(model.spec.vocab_size, ALONE, replace=False)
    alone = torch.from_numpy(drawn)[:, None]
    own, theirs = (_middle(each, context, alone) for each in (model, context.dense))
    off = (own - theirs).square().sum(-1) / theirs.square().sum(-1)
    return round(float((off > LOST).float().mean()), 4)


def _hidden(model: CausalLM, context: Context, tokens: Tensor) -> Tensor:
    """Hidden states before the final norm, (N, T, D)."""
    variant = dense_variant(model.spec)
    return Walk(model, tokens, context.device, context.dtype).run([variant])[variant]


def _middle(model: CausalLM, context: Context, tokens: Tensor) -> Tensor:
    """Hidden states behind the middle layer, (N * T, D), float32."""
    layers = Walk(model, tokens, context.device, context.dtype).stream(dense_variant(model.spec))
    _, (_, _, after) = next(islice(layers, len(model.spec.layers) // 2, None))
    return after.flatten(0, 1).float()


def as_markdown(cells: Mapping[str, Any]) -> str:
    """A row for each model."""
    lines = [
        "| fitted to | | KL as it is | behind a line break | behind a chat's opening | first tokens lost |",
        "| :--- | :--- | ---: | ---: | ---: | ---: |",
    ]
    fitted = {"texts": "texts alone", "first-tokens": "first tokens too"}
    for key, cell in cells.items():
        for name, found in cell.items():
            figures = " | ".join(f"{found[behind]:.3f}" for behind in ("nothing", "line_break", "chat"))
            lines.append(f"| {fitted[key]} | {name} | {figures} | {found['lost']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
