"""Optimal Brain Surgeon for whole units: what each costs when units go one after another and the rest makes up for it.

Letters: D hidden_size, F inputs of the projection, U units of ``unit`` neighbouring inputs each, F = U * unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gram import damped

#: Units that go at once, as a share of all: between them the inverse is brought up to date.
STRIDE = 1 / 64


def costs(weight: Tensor, gram: Tensor, unit: int, going: int | None = None) -> Tensor:
    """The error that each unit adds when it goes in its turn, (U,).

    The unit with the least ``tr(W_u [H⁻¹]_uu⁻¹ W_uᵀ)`` goes; the weights of the others take its part, H⁻¹ loses its
    rows and columns, and again, until none is left (Hassibi and Stork, 1992; for units: ZipLM, Kurtic et al., 2023).

    Args:
        weight: W, (D, F).
        gram: H before damping, the mean over tokens of x xᵀ, (F, F).
        unit: inputs of one unit.
        going: units that have to go; all if None.

    Returns:
        squared error of the output, summed over D, per token. Never less than for the unit that went before, so that
        the order of the costs is the order of going; infinite for those whose turn did not come.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(gram)))
    weight = weight.clone()
    units = len(gram) // unit
    found, spent = weight.new_full((units,), torch.inf), 0.0
    stride = max(1, round(units * STRIDE))
    for done in range(0, units if going is None else going, stride):
        errors = _errors(weight, inverse, unit).where(found.isinf(), torch.inf)
        chosen = errors.topk(min(stride, units - done), largest=False).indices
        # A millionth between one and the next, so that their order is kept.
        steps = 1 + 1e-6 * torch.arange(1, len(chosen) + 1, device=found.device)
        found[chosen] = max(spent, float(errors[chosen].mean())) * steps
        spent = float(found[chosen[-1]])
        inputs = (chosen[:, None] * unit + torch.arange(unit, device=chosen.device)).flatten()
        _remove(inputs, weight, inverse)
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


def _remove(inputs: Tensor, weight: Tensor, inverse: Tensor) -> None:
    """Take inputs out, in place: the weights of the others make up for them, the inverse forgets them.

    In place and without moving what is left together: copies of the inverse would cost more than its zeros do.
    """
    rows = inverse[inputs]  # (gone, F)
    between = torch.linalg.solve(rows[:, inputs].double(), rows.double()).to(inverse.dtype)
    weight.addmm_(weight[:, inputs], between, alpha=-1)
    inverse.addmm_(rows.T, between, alpha=-1)
    # What is nought but for rounding is made nought; the ones keep the blocks of those that went positive definite.
    inverse[inputs] = 0
    inverse[:, inputs] = 0
    inverse[inputs, inputs] = 1
    weight[:, inputs] = 0
