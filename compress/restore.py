"""Restoration: after a cut, refit what is left to what was there."""

from __future__ import annotations

import torch
from torch import Tensor

#: Damping of the normal equations, as a share of the mean diagonal (GPTQ's convention, Frantar et al., 2022).
DAMPING = 0.01


def refit(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The projection from the kept inputs that comes nearest to the dense output on the calibration inputs.

    Minimises ||X Wᵀ - X_k W_kᵀ||² + λ ||W_k - W[:, k]||² over W_k, which the Gram matrix G = XᵀX gives in closed
    form: W_k = (W G[:, k] + λ W[:, k]) (G[k, k] + λI)⁻¹. Damped towards the weights that were there, not to zero.

    Args:
        weight: the dense projection W, (D, F).
        gram: G, (F, F).
        keep: indices k of the inputs that stay.
        damping: λ as a share of the mean diagonal of G[k, k].

    Returns:
        W_k, (D, len(keep)), float32.
    """
    gram, weight = gram.double(), weight.double()
    kept = gram[keep][:, keep]
    ridge = damping * kept.diagonal().mean()
    right = weight @ gram[:, keep] + ridge * weight[:, keep]  # (D, K)
    factor = torch.linalg.cholesky(kept + ridge * torch.eye(len(keep), dtype=kept.dtype, device=kept.device))
    return torch.cholesky_solve(right.T, factor).T.float()
