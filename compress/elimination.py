"""Optimal Brain Surgeon for whole units: what each costs when units go one after another and the rest makes up for it.

Letters: D hidden_size, F inputs of the projection, U units of ``unit`` neighbouring inputs each, F = U * unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import damped

#: Units that go at once, as a share of all: between them the inverse is brought up to date.
STRIDE = 1 / 64


def costs(weight: Tensor, gram: Tensor, unit: int) -> Tensor:
    """The error that each unit adds when it goes in its turn, (U,).

    The unit with the least ``tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ)`` goes; the weights of the others take its part, H⁻¹ loses its
    rows and columns, and again, until none is left (Hassibi and Stork, 1992; for units: ZipLM, Kurtic et al., 2023).

    Args:
        weight: W, (D, F).
        gram: H before damping, the mean over tokens of x xᵀ, (F, F).
        unit: inputs of one unit.

    Returns:
        squared error of the output, summed over D, per token. Never less than for the unit that went before, so that
        the order of the costs is the order of going.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    live = torch.arange(len(gram) // unit, device=gram.device)
    found, spent = weight.new_zeros(len(live)), 0.0
    stride = max(1, round(len(live) * STRIDE))
    while len(live):
        errors = _errors(weight, inverse, unit)
        going = errors.topk(min(stride, len(live)), largest=False).indices
        spent = max(spent, float(errors[going].mean()))
        # A millionth between those that go at once, so that their order is kept.
        found[live[going]] = spent * (1 + 1e-6 * torch.arange(len(going), device=found.device))
        weight, inverse, live = _without(going, weight, inverse, live, unit)
    return found


def _errors(weight: Tensor, inverse: Tensor, unit: int) -> Tensor:
    """tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ) of each unit, (U,)."""
    if unit == 1:
        return weight.square().sum(0) / inverse.diagonal()
    own = weight.reshape(len(weight), -1, unit).transpose(0, 1)  # (U, D, unit)
    at = torch.arange(own.shape[0], device=weight.device)
    blocks = inverse.reshape(len(at), unit, len(at), unit)[at, :, at]  # (U, unit, unit)
    solved = torch.cholesky_solve(own.transpose(1, 2), torch.linalg.cholesky(blocks))  # (U, unit, D)
    errors: Tensor = (own.transpose(1, 2) * solved).sum((1, 2))
    return errors


def _without(going: Tensor, weight: Tensor, inverse: Tensor, live: Tensor, unit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inverse and numbers of the units that are left, after these went and the rest made up for them."""
    stays = torch.ones_like(live, dtype=torch.bool)
    stays[going] = False
    inputs = stays.repeat_interleave(unit)
    gone, kept = (~inputs).nonzero()[:, 0], inputs.nonzero()[:, 0]
    between = torch.linalg.solve(inverse[gone][:, gone].double(), inverse[gone][:, kept].double()).to(inverse.dtype)
    weight = torch.addmm(weight[:, kept], weight[:, gone], between, alpha=-1)
    inverse = torch.addmm(inverse[kept][:, kept], inverse[kept][:, gone], between, alpha=-1)
    return weight, inverse, live[stays]
