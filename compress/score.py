"""What a unit is worth: pure functions of a projection's weights and of what it received during calibration.

A unit is an FFN channel, heard at the FFN's output projection, or a KV group with its query heads, heard at the
attention's. Unit u owns ``unit`` neighbouring inputs of the projection and contributes ``x_u @ weight[:, u].T``.

To add a score, write a function and list it in ``SCORES``. Letters: D hidden_size, F inputs, U units, F = U * unit.
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
        weight: the projection's weight, (D, F), float32.
        square: the sum over tokens of each input's square, (F,), float32.
        total: the sum over tokens of each input, (F,), float32.
        tokens: how many tokens were heard.
        unit: inputs that belong to one unit.
        gram: the inputs' Gram matrix, the sum over tokens of x xᵀ, (F, F), float32, if it was asked for.
        going: how many units will go; what others are worth beside these need not be told. None if that is not known.
    """

    weight: Tensor
    square: Tensor
    total: Tensor
    tokens: int
    unit: int = 1
    gram: Tensor | None = None
    going: int | None = None

    @property
    def mean_square(self) -> Tensor:
        """The mean square of each input, (F,)."""
        return self.square / self.tokens

    @property
    def variance(self) -> Tensor:
        """The variance of each input, (F,)."""
        spread = self.square - self.total.square() / self.tokens
        return spread.clamp(min=0) / max(1, self.tokens - 1)

    def per_unit(self, worth: Tensor) -> Tensor:
        """What the inputs of each unit are worth together, (F,) to (U,)."""
        return worth.reshape(-1, self.unit).sum(-1)


def magnitude(heard: Heard) -> Tensor:
    """The norm of the unit's output weights, (U,): no calibration."""
    return heard.per_unit(heard.weight.square().sum(0)).sqrt()


def activation(heard: Heard) -> Tensor:
    """The norm of the unit's activations, (U,), as in 2SSP (Sandri et al., 2025)."""
    return heard.per_unit(heard.mean_square).sqrt()


def wanda(heard: Heard) -> Tensor:
    """Activation norm times weight norm, (U,): Wanda-sp, Wanda (Sun et al., 2023) for whole units."""
    return heard.per_unit(heard.mean_square.sqrt() * heard.weight.norm(dim=0))


def wifv(heard: Heard) -> Tensor:
    """Variance of the unit's activations times its squared weight norm, (U,): FLAP (An et al., 2023).

    An input that hardly varies can be replaced by its mean, whatever that is.
    """
    return heard.per_unit(heard.variance * heard.weight.square().sum(0))


def obs(heard: Heard) -> Tensor:
    """Output error per token that goes with the unit when all that are worth more are refitted, (U,).

    Optimal Brain Surgeon (Hassibi and Stork, 1992) for whole units, one after another as in ZipLM (Kurtic et al.,
    2023): the least costly goes, the others are refitted, and again. Unlike the other scores it knows which units say
    the same. Of as many as will go, if that is known; what stays is worth infinitely much.
    """
    from .elimination import costs

    assert heard.gram is not None, "obs hears the Gram matrix"
    return costs(heard.weight, heard.gram / heard.tokens, heard.unit, heard.going)


def first_n(heard: Heard) -> Tensor:
    """The unit's place, the first one highest, (U,): what Flab-Pruner's published code keeps. For comparison."""
    return heard.weight.new_tensor(range(heard.weight.shape[1] // heard.unit, 0, -1))


@dataclass(frozen=True)
class Score:
    """How to score: a function, and whether it needs the Gram matrix, which takes most of the time."""

    worth: Callable[[Heard], Tensor]
    gram: bool = False


SCORES: dict[str, Score] = {
    "activation": Score(activation),
    "first_n": Score(first_n),
    "magnitude": Score(magnitude),
    "obs": Score(obs, gram=True),
    "wanda": Score(wanda),
    "wifv": Score(wifv),
}
