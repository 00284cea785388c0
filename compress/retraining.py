"""The recover stage: training between cuts, so that a recipe may prune, recover and prune again.

It trains on the calibration text, after the dense model in the present vocabulary unless it is told otherwise, and
keeps the state that does best on a tenth of that text; where none does better than what was there, that stays.
Iterative pruning is that of Han et al. (2015) and, for language models, of Minitron (Muralidharan et al., 2024).
``flabc recover`` trains a finished checkpoint, on tasks too.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flabc.errors import CorpusError

from . import checkpoint
from .config import RecoverConfig
from .data.examples import DEV_ONE_IN, Example, of_texts
from .devices import name_of
from .model import CausalLM, cut_vocab
from .stage import Context, Plan, Stage, encoder, openings
from .stored import Weight

if TYPE_CHECKING:
    from .recover import Trained

#: Pieces of text that there are for each that is drawn, if the text is long enough.
DRAWN_FROM = 8


@dataclass(frozen=True)
class RecoverPlan(Plan):
    """The trained weights by checkpoint name, in the model's dtype."""

    trained: Mapping[str, Weight] = field(default_factory=dict)


def plan(model: CausalLM, config: RecoverConfig, context: Context) -> RecoverPlan:
    """Train a copy of the model.

    Raises:
        CorpusError: if the text has too few sequences.
        RecoveryError: if the loss is no number any more.
    """
    examples = _examples(model, config, context)
    watched = max(1, len(examples) // DEV_ONE_IN)
    with tempfile.TemporaryDirectory(prefix="flabc-", dir=context.scratch) as scratch:
        done = _trained(model, config, context, examples[watched:], examples[:watched], Path(scratch))
    before, after = done.before, done.after
    details = {
        "method": config.method,
        "tokens": done.tokens,
        "steps": done.steps,
        "best_step": done.best_step,
        "before": before.named(),
        "after": after.named(),
    }
    unit = "" if config.hidden_weight else " nats a token"
    summary = f"recover: {done.tokens:,} tokens; loss {before.loss:.4f} → {after.loss:.4f}{unit}"
    if after.loss >= before.loss:
        return RecoverPlan(f"{summary}: not better, so the weights stay as they were", {**details, "kept": False})
    weights = {name: context.keep(done.weights[name], model) for name in model.spec.shapes()}
    return RecoverPlan(summary, {**details, "kept": True}, weights)


def _examples(model: CausalLM, config: RecoverConfig, context: Context) -> list[Example]:
    """Pieces of the calibration text, drawn from several times as many, each document with one of the openings.

    Raises:
        CorpusError: if there are not so many.
    """
    length, found = min(config.max_length, model.spec.max_position_embeddings), list[Example]()
    tokenizer, ways = encoder(model.tokenizer), openings(model)
    for number, document in enumerate(context.documents):
        begin = ways[number % len(ways)][: length // 2]
        found += of_texts([document.text], tokenizer, begin=begin, max_length=length)
        if len(found) >= DRAWN_FROM * config.sequences:
            break
    if len(found) < config.sequences:
        raise CorpusError(
            f"The calibration text has {len(found)} pieces of up to {length} tokens.",
            expected=f"{config.sequences}",
            fix="Give more text, or lower the recover stage's sequences or max_length.",
        )
    drawn = np.random.default_rng(context.seed).permutation(len(found))[: config.sequences]
    return [found[at] for at in drawn]


def _trained(
    model: CausalLM,
    config: RecoverConfig,
    context: Context,
    examples: list[Example],
    dev: list[Example],
    scratch: Path,
) -> Trained:
    from . import recover

    options, device = config.options(context.seed, name_of(context.dtype)), str(context.device)
    teacher = None
    if options.share_of_kl(teacher=True) or options.hidden_weight:
        dense = cut_vocab(context.dense, model.token_origin)
        opened = _opened(dense, scratch / "dense", context.dtype)
        teacher = recover.as_teacher(opened, range(model.spec.vocab_size), model.layer_origin, device)
    student = _opened(model, scratch / "model")
    return recover.train(student, teacher, examples, dev, options, scratch / "states", pad=0, device=device)


def _opened(model: CausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model in transformers, by a folder, as everybody opens it."""
    from . import recover

    folder.mkdir()
    checkpoint.write(model, folder)
    return recover.open_model(folder, model.spec, dtype)


def apply(model: CausalLM, plan: RecoverPlan) -> CausalLM:
    """Put the trained weights in place."""
    return replace(model, weights={**model.weights, **plan.trained})


RECOVER: Stage[RecoverConfig, RecoverPlan] = Stage(plan, apply)
