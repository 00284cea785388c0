"""Whether a compression can be done here, before any work: memory, disk, and whether weights have to stay on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import psutil
import torch

from flabc.errors import UsageError
from flabc.families import family_named
from flabc.frozen import Frozen
from flabc.spec import ModelSpec

from . import generated
from .allocate import ALLOCATIONS
from .config import Calibration, LayersConfig, RecoverConfig, RestoreConfig, WidthsConfig
from .sensitivity import SHARES
from .walk import LOGIT_ROWS

#: What Python, torch and transformers take by themselves.
INTERPRETER_BYTES = 900 * 2**20


def streams(
    spec: ModelSpec,
    stored_bytes: int,
    stages: Sequence[Frozen],
    calibration: Calibration,
    *,
    dtype: torch.dtype,
    memory: int | None,
    can_stream: bool,
) -> bool:
    """Whether the weights have to stay on disk for the memory to suffice.

    Args:
        spec: the dense model.
        stored_bytes: of its weights.
        stages: what will be done.
        calibration: on how much text.
        dtype: what is computed in.
        memory: bytes that may be used; what is free if None.
        can_stream: whether the weights are safetensors, which can be read one by one.

    Raises:
        UsageError: if it does not suffice either way.
    """
    limit = memory or psutil.virtual_memory().available
    work = workspace_bytes(spec, stages, calibration, dtype)
    resident = copies(stages) * stored_bytes + work
    if resident <= limit:
        return False
    if can_stream and work <= limit and not calibration.generated:
        return True
    fix = "Lower calibration.sequences or calibration.sequence_length"
    if calibration.generated:
        fix += ", or calibrate without generated text: a model that writes has to be in memory."
    elif can_stream:
        fix += "."
    else:
        fix += ", or convert the model to safetensors, which are read one by one."
    raise UsageError(
        "There is not enough memory.",
        expected=f"{_gib(work if can_stream and not calibration.generated else resident)}",
        found=f"{_gib(limit)}",
        fix=fix,
    )


def copies(stages: Sequence[Frozen]) -> int:
    """How many models there are at once: the dense one, the cut one, and what is refitted of it if that is most."""
    return 3 if any(isinstance(stage, RestoreConfig) and stage.inputs for stage in stages) else 2


def workspace_bytes(spec: ModelSpec, stages: Sequence[Frozen], calibration: Calibration, dtype: torch.dtype) -> int:
    """What the stages need at most beside the weights of a model that is not streamed.

    Two layers, both embeddings and a block of logits are always there; then either the model and its cache while it
    writes, or the states of all variants of a layers stage, or the inputs, states and normal equations of one
    projection.
    """
    computed, hidden, width = dtype.itemsize, spec.hidden_size, max(layer.intermediate_size for layer in spec.layers)
    one_layer = max(sum(layer.values()) for layer in spec.layer_parameters())
    always = computed * (2 * spec.vocab_size * hidden + 2 * one_layer)
    always += 3 * 4 * LOGIT_ROWS * spec.vocab_size
    tokens = ceil(calibration.sequences * (1 + calibration.first_tokens)) * calibration.sequence_length
    needs = [tokens * hidden * computed]
    if calibration.generated:
        room = min(generated.BATCH, generated.count(calibration)) * generated.length(calibration)
        needs.append(computed * spec.num_parameters + room * spec.kv_bytes_per_token(computed))
    for stage in stages:
        if isinstance(stage, LayersConfig):
            sequences = min(stage.sequences, calibration.sequences)
            needs.append((len(spec.layers) + 2) * sequences * calibration.sequence_length * hidden * computed)
        if isinstance(stage, WidthsConfig):
            needs.append(tokens * hidden * 2 * computed + 6 * 4 * width**2)
            if ALLOCATIONS[stage.allocation].measured:
                variants = len(spec.layers) * len(stage.of) * len(SHARES) + 2
                needs.append(variants * stage.sequences * calibration.sequence_length * hidden * computed)
        if isinstance(stage, RestoreConfig):
            states = tokens * hidden * (4 * computed + 3 * 4) + tokens * width * computed
            if family_named(spec.family).normed_outputs:  # what projections give is kept too, dense and cut
                states += 5 * tokens * hidden * computed
            needs.append(states + 3 * 8 * width**2)
        if isinstance(stage, RecoverConfig):
            copies = 2 if stage.method == "lora" else 5  # student and teacher; gradients and two moments of Adam
            logits = 3 * 4 * stage.batch * stage.max_length * spec.vocab_size
            needs.append(copies * 4 * spec.num_parameters + logits)
    return INTERPRETER_BYTES + always + max(needs)


def training_bytes(spec: ModelSpec, stages: Sequence[Frozen]) -> int:
    """What a stage that trains puts aside on disk at most: two models, and the states of the training.

    Of all weights a state has these and two moments of Adam in float32; the best and the last one are kept while the
    next is written. States of adapters are small beside a model.
    """
    copies = [2 if stage.method == "lora" else 2 + 3 * 3 for stage in stages if isinstance(stage, RecoverConfig)]
    return max(copies, default=0) * 4 * spec.num_parameters


def check_disk(folder: Path, needed: int, *, fix: str) -> None:
    """Make sure that there is room for what will be written to a folder, which need not exist yet.

    Args:
        folder: where it will lie.
        needed: bytes.
        fix: what to do if there is not.

    Raises:
        UsageError: if there is not.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UsageError(
            f"There is not enough room on the disk of {place}.", expected=_gib(needed), found=_gib(free), fix=fix
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
