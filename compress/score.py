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
        tokens: how many tokens were heard.
    """

    down: Tensor
    gram: Tensor
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


SCORES: dict[str, Callable[[Heard], Tensor]] = {
    "activation": activation,
    "magnitude": magnitude,
    "wanda": wanda,
}
