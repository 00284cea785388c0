"""Biases of output projections: what a cut takes from a projection's mean is put back there (FLAP, An et al., 2023).

A family says which projections may have a bias, and by which config flag. Switching a flag on adds every bias that
the flag stands for, nought where nothing is put back, so that the checkpoint stays one of the family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from flabc.families import Family, TensorSlot

from .model import CausalLM


def name_of(model: CausalLM, role: str, layer: int) -> str | None:
    """The checkpoint name of a projection's bias, None if the model has none there."""
    slot = _slot(model.family, role)
    name = slot.name.format(layer=layer) if slot else ""
    return name if name in model.weights else None


def addable(model: CausalLM, roles: Sequence[str]) -> tuple[str, ...]:
    """The config flags, off so far, that would give these projections a bias."""
    slots = (_slot(model.family, role) for role in roles)
    flags = dict.fromkeys(slot.when for slot in slots if slot and slot.when)
    return tuple(flag for flag in flags if not model.spec.flags[flag])


def switched_on(model: CausalLM, flags: Sequence[str]) -> CausalLM:
    """The same model with these flags on: the biases that they stand for are there, and nought."""
    if not flags:
        return model
    on = dict.fromkeys(flags, True)
    spec = model.spec.model_copy(update={"flags": {**model.spec.flags, **on}})
    new = {
        slot.name.format(layer=layer): torch.zeros(shape, dtype=model.dtype)
        for slot, layer, shape in spec.tensors()
        if slot.when in on
    }
    return replace(model, spec=spec, config={**model.config, **on}, weights={**model.weights, **new})


def _slot(family: Family, role: str) -> TensorSlot | None:
    return next((slot for slot in family.layer_tensors if slot.role == f"{role}_bias"), None)
