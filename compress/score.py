"""What an FFN channel is worth: pure functions of a layer's weights and of what was heard during calibration.

To add a score, write a function and list it in ``SCORES``. A channel j contributes ``x_j * down[:, j]`` to the
layer's output, where x is what the output projection receives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heard:
    """One layer's output projection and its inputs.

    Args:
        down: the projection's weight, (D, F), float32.
        gram: the inputs' Gram matrix, the sum over tokens of x xᵀ, (F, F), float32.
        total: the sum of the inputs over tokens, (F,), float32.
        tokens: how many tokens were heard.
    """

    down: Tensor
    gram: Tensor
    total: Tensor
    tokens: int

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each input channel, (F,)."""
        return self.gram.diagonal() / self.tokens


def magnitude(heard: Heard) -> Tensor:
    """The norm of the channel's output weights, (F,): no calibration."""
    norm: Tensor = heard.down.norm(dim=0)
    return norm


def activation(heard: Heard) -> Tensor:
    """The norm of the channel's activations, (F,), as in 2SSP (Sandri et al., 2025)."""
    return heard.mean_square.sqrt()


def wanda(heard: Heard) -> Tensor:
    """Activation norm times weight norm, (F,): Wanda (Sun et al., 2023) for whole channels."""
    return heard.mean_square.sqrt() * magnitude(heard)


def wifv(heard: Heard) -> Tensor:
    """Variance of the channel's activations times its squared weight norm, (F,): FLAP (An et al., 2023).

    A channel that hardly varies can be replaced by its mean, whatever that is.
    """
    spread = heard.gram.diagonal() - heard.total.square() / heard.tokens
    return spread.clamp(min=0) / max(1, heard.tokens - 1) * magnitude(heard).square()


def obs(heard: Heard) -> Tensor:
    """Output error that is left when the channel goes and all others are refitted, (F,), per token.

    Optimal Brain Surgeon (Hassibi and Stork, 1992) for a whole channel: ||w_j||² / [H⁻¹]_jj, with H the damped Gram
    matrix. Unlike the other scores it knows which channels say the same.
    """
    import torch

    from .restore import damped

    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(heard.gram.double())))
    return magnitude(heard).square() / inverse.diagonal().float() / heard.tokens


def first_n(heard: Heard) -> Tensor:
    """The channel's place, the first one highest, (F,): what Flab-Pruner's published code keeps. For comparison."""
    return heard.down.new_tensor(range(heard.down.shape[1], 0, -1))


SCORES: dict[str, Callable[[Heard], Tensor]] = {
    "activation": activation,
    "first_n": first_n,
    "magnitude": magnitude,
    "obs": obs,
    "wanda": wanda,
    "wifv": wifv,
}
