"""What the absence of a part costs: each criterion compares a variant's readout with the dense model's.

To add a criterion, write a function and list it in ``CRITERIA``. A criterion gets two readouts of the same tokens
and returns one cost per token; the mean over tokens is the score, and the least costly part goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """What a model says at the end of some tokens.

    Args:
        log_probs: log-probabilities of the next token, (n, V), float32.
        targets: the tokens that came next, (n,).
    """

    log_probs: Tensor
    targets: Tensor


def kl(dense: Readout, variant: Readout) -> Tensor:
    """KL(dense || variant) over the token logits, in nats, (n,). The objective of Flab-Pruner (Fang et al., 2024)."""
    return (dense.log_probs.exp() * (dense.log_probs - variant.log_probs)).sum(-1)


def perplexity(dense: Readout, variant: Readout) -> Tensor:
    """The variant's own loss on the next tokens, in nats, (n,): ranks parts as perplexity does."""
    return -variant.log_probs.gather(-1, variant.targets[:, None]).squeeze(-1)


CRITERIA: dict[str, Callable[[Readout, Readout], Tensor]] = {"kl": kl, "perplexity": perplexity}
