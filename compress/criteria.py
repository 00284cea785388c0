"""What the absence of a part costs; the least costly part goes first.

To add a criterion, write a function and list it in ``CRITERIA``. There are two kinds: one reads what a variant says
(``Readouts``), the other only how far a part moves the residual stream (``Stream``), for which one forward pass of
the present model is enough.

Letters in shape comments: N sequences, T tokens of each, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import pi
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

    @cached_property
    def probs(self) -> Tensor:
        """Probabilities of the next token, (n, V); computed once for all variants that are compared with them."""
        return self.log_probs.exp()


@dataclass(frozen=True)
class Readouts:
    """A criterion that compares what a variant says with what the dense model says, one cost per token, (n,)."""

    cost: Callable[[Readout, Readout], Tensor]


@dataclass(frozen=True)
class Stream:
    """A criterion that compares the residual stream before and after a part, (N, T, D) each; costs of any shape."""

    cost: Callable[[Tensor, Tensor], Tensor]


Criterion = Readouts | Stream


def kl(dense: Readout, variant: Readout) -> Tensor:
    """KL(dense || variant) over the token logits, in nats, (n,). The objective of Flab-Pruner (Fang et al., 2024)."""
    import torch

    cost: Tensor = torch.linalg.vecdot(dense.probs, dense.log_probs - variant.log_probs)
    return cost


def perplexity(dense: Readout, variant: Readout) -> Tensor:
    """The variant's own loss on the next tokens, in nats, (n,): ranks parts as perplexity does (SLEB, Song, 2024)."""
    return -variant.log_probs.gather(-1, variant.targets[:, None]).squeeze(-1)


def bi(before: Tensor, after: Tensor) -> Tensor:
    """Block influence: 1 - cosine at every token, (N, T). ShortGPT (Men et al., 2024)."""
    return 1 - _cosine(before, after)


def last_token_cosine(before: Tensor, after: Tensor) -> Tensor:
    """1 - cosine at the last token of each sequence, (N,): what Flab-Pruner's published code measures."""
    return 1 - _cosine(before[:, -1], after[:, -1])


def angular(before: Tensor, after: Tensor) -> Tensor:
    """Angle at the last token of each sequence, in half turns, (N,). Gromov et al. (2024), who cut a run of layers."""
    return _cosine(before[:, -1], after[:, -1]).clamp(-1, 1).arccos() / pi


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    import torch

    return torch.cosine_similarity(before.float(), after.float(), dim=-1)


CRITERIA: dict[str, Criterion] = {
    "angular": Stream(angular),
    "bi": Stream(bi),
    "kl": Readouts(kl),
    "last_token_cosine": Stream(last_token_cosine),
    "perplexity": Readouts(perplexity),
}
