"""A recipe's stages, one after another, on one model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

import torch

from flabc.console import note
from flabc.errors import FlabcError, StageError
from flabc.families import Part
from flabc.frozen import Frozen
from flabc.spec import BYTES_PER_PARAMETER, ModelSpec

from .config import Calibration, LayersConfig, RecoverConfig, RestoreConfig, Target, VocabConfig, WidthsConfig
from .data import corpus
from .data.corpus import Document, Split
from .devices import compute_dtype, device_named
from .generated import written
from .layers import LAYERS
from .model import CausalLM, check_weights
from .restore import RESTORE
from .retraining import RECOVER
from .stage import Context, Stage, before_text, encoder
from .vocab import VOCAB
from .walk import Walk, dense_variant
from .widths import WIDTHS

#: The stages, by the config that asks for them.
STAGES: dict[type[Frozen], Stage[Any, Any]] = {
    VocabConfig: VOCAB,
    LayersConfig: LAYERS,
    WidthsConfig: WIDTHS,
    RestoreConfig: RESTORE,
    RecoverConfig: RECOVER,
}

#: Documents of each side.
Text = dict[Split, list[Document]]

#: Held-out windows, and their length in tokens, on which the result is compared with the dense model.
CHECKED_WINDOWS, CHECKED_LENGTH = 8, 512


@dataclass(frozen=True)
class StageReceipt:
    """What one stage did."""

    stage: str
    summary: str
    parameters: int
    seconds: float
    details: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        return dict(vars(self))


def run(
    model: CausalLM,
    stages: Sequence[Frozen],
    *,
    target: Target | None,
    calibration: Calibration,
    device: str = "cpu",
    seed: int = 0,
    scratch: Path | None = None,
    text: Text | None = None,
) -> tuple[CausalLM, list[StageReceipt], dict[str, Any]]:
    """Run the stages in order.

    Args:
        model: the dense model.
        stages: their configs, in order.
        target: how much is to be left at the end.
        calibration: the text to listen to.
        device: a torch device.
        seed: picks the calibration sequences.
        scratch: a folder for new tensors, if the model's weights stay on disk.
        text: what ``text_of`` gave for the same, if it is there already.

    Returns:
        the cut model, a receipt for each stage, and how the result does on held-out text.

    Raises:
        StageError: if a stage cannot do what it was asked (it is named), or all together miss the target.
    """
    context = replace(context_of(model, target, calibration, device, seed, text), scratch=scratch)
    dense = model
    model, receipts = run_stages(model, stages, context)
    check_target(model, context)
    quality = {
        "calibration": corpus.fingerprint(context.documents),
        "heldout": corpus.fingerprint(context.heldout),
        "heldout_bits_per_byte": {
            "dense": bits_per_byte(dense, context),
            "pruned": bits_per_byte(model, context),
        },
    }
    return model, receipts, quality


def run_stages(model: CausalLM, stages: Sequence[Frozen], context: Context) -> tuple[CausalLM, list[StageReceipt]]:
    """Run some of a recipe's stages in order, whether or not they reach the target.

    Raises:
        StageError: if a stage cannot do what it was asked; it is named.
    """
    receipts = list[StageReceipt]()
    for config in stages:
        started = time.monotonic()
        name = str(getattr(config, "stage", type(config).__name__))
        try:
            plan = STAGES[type(config)].plan(model, config, context)
            note(plan.summary)
            model = STAGES[type(config)].apply(model, plan)
            check_weights(model, stored=False)
        except FlabcError as error:
            raise StageError(f"Stage {name!r} stopped: {error}") from error
        seconds = round(time.monotonic() - started, 2)
        receipts.append(StageReceipt(name, plan.summary, model.spec.num_parameters, seconds, dict(plan.details)))
    return model, receipts


def bits_per_byte(model: CausalLM, context: Context) -> float:
    """What the model needs to encode held-out text, independent of its tokens; windows are cut by characters."""
    enough = [d for d in context.heldout if len(d.text) > 3 * CHECKED_LENGTH]
    texts = [Document(d.name, d.text[: 3 * CHECKED_LENGTH]) for d in enough or context.heldout]
    tokenizer = encoder(model.tokenizer)
    before = before_text(tokenizer) or tokenizer.encode("\n").ids
    nats = weight = 0.0
    for document in texts[:CHECKED_WINDOWS]:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        walk = Walk(model, torch.tensor([[*before, *ids]]), context.device, context.dtype)
        variant = dense_variant(model.spec)
        read = (group[variant] for group in walk.readouts(walk.run([variant])))
        found = torch.cat([each.log_probs.gather(-1, each.targets[:, None]) for each in read])
        nats -= float(found[len(before) - 1 :].sum())
        weight += len(document.text.encode())
    return round(nats / log(2) / max(1.0, weight), 5)


def parameters_left(target: Target, spec: ModelSpec) -> int:
    """How many parameters a target leaves of a dense model."""
    total = spec.num_parameters
    if target.block_params is not None:
        inside = sum(spec.parameters()[part] for part in (Part.ATTENTION, Part.FFN))
        return total - round(inside * (1 - target.block_params))
    if target.bytes is not None:
        return int(target.bytes / BYTES_PER_PARAMETER[target.precision])
    amount = target.params or 0  # one is given, and the others are not
    return round(total * amount) if amount < 1 else int(amount)


def check_target(model: CausalLM, context: Context) -> None:
    """Refuse a model that is larger than it was to be.

    Raises:
        StageError: which says the nearest target that its stages reach.
    """
    wanted, found = context.target_parameters, model.spec.num_parameters
    if wanted is not None and found > wanted:
        nearest = found / context.dense.spec.num_parameters
        raise StageError(
            "The recipe's stages do not reach its target.",
            expected=f"at most {wanted:,} parameters",
            found=f"{found:,}; the nearest is target.params={nearest:.3f}",
            fix="Raise the target to that, or let the stages cut more; a stage without an amount takes the rest.",
        )


def context_of(
    model: CausalLM, target: Target | None, calibration: Calibration, device: str, seed: int, text: Text | None = None
) -> Context:
    """What the stages of a recipe may use, beginning with this model.

    Raises:
        UsageError: if torch cannot compute on the device.
        CorpusError: if there is not enough text.
    """
    torch.manual_seed(seed)
    place = device_named(device)
    text = text or text_of(model, calibration, device, seed)
    return Context(
        dense=model,
        calibration=calibration,
        documents=text["calibration"],
        heldout=text["heldout"],
        target_parameters=parameters_left(target, model.spec) if target else None,
        device=place,
        dtype=compute_dtype(place),
        seed=seed,
    )


def text_of(model: CausalLM, calibration: Calibration, device: str, seed: int) -> Text:
    """The text that a recipe listens to, what the dense model writes among it, and that which is held out.

    Raises:
        UsageError: if torch cannot compute on the device.
        CorpusError: if there is not enough.
    """
    place, text = device_named(device), corpus.sides(calibration.corpus)
    if calibration.generated:
        read, dtype = text["calibration"], compute_dtype(place)
        text["calibration"] = [*read, *written(model, read, calibration, device=place, dtype=dtype, seed=seed)]
    return text
