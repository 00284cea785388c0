"""From logits to the next token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from .backend import Logits


class SamplingParams(BaseModel):
    """How an answer is drawn. Names and defaults as OpenAI's API has them, but greedy unless asked otherwise.

    Args:
        max_tokens: tokens to produce at most.
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_p: sample from the smallest set of tokens with this much probability.
        stop: texts that end the answer; they are not part of it, and may span tokens.
        seed: makes sampling repeatable.
        ignore_eos: go on after the end-of-sequence token; for measuring.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(128, gt=0)
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False


Probabilities = npt.NDArray[np.float64]
Sampler = Callable[[Logits], int]


def sampler(params: SamplingParams) -> Sampler:
    """A function from one sequence's logits, (V,), to the next token, with its own random state."""
    if params.temperature == 0:
        return lambda logits: int(np.argmax(logits))
    rng = np.random.default_rng(params.seed)

    def draw(logits: Logits) -> int:
        scaled = logits.astype(np.float64) / params.temperature
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        if params.top_p < 1:
            probabilities = nucleus(probabilities, params.top_p)
        return int(rng.choice(len(probabilities), p=probabilities))

    return draw


def nucleus(probabilities: Probabilities, top_p: float) -> Probabilities:
    """Keep the smallest set of tokens whose probability reaches ``top_p`` (Holtzman et al., 2020), renormalised."""
    order = np.argsort(-probabilities, kind="stable")
    needed = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    kept = np.zeros_like(probabilities)
    kept[order[:needed]] = probabilities[order[:needed]]
    kept /= kept.sum()
    return kept
