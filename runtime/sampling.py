"""From logits to the next token.

Logits are changed in the order in which transformers' ``generate`` lists its processors: repetition penalty,
temperature, top-k, top-p, min-p. Log-probabilities are the model's own, before any of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from .backend import Logits

#: Log-probabilities that may be asked for at each place, as OpenAI's API has it.
MAX_LOGPROBS = 20

#: Tokens that are by this many nats less likely than the most likely one are not drawn. All of them together have less
#: probability than float32 logits are rounded by, and leaving them out saves most of the time that drawing takes.
NEGLIGIBLE = 25.0


class SamplingParams(BaseModel):
    """How an answer is drawn. Names and defaults as OpenAI's API has them, but greedy unless asked otherwise.

    Args:
        max_tokens: tokens to produce at most.
        temperature: 0 takes the most likely token; 1 samples from the model's distribution.
        top_k: sample from the so many most likely tokens; 0 means from all.
        top_p: sample from the smallest set of tokens with this much probability.
        min_p: leave out tokens less likely than this share of the most likely one's probability.
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it, or multiplied if they are
            negative (Keskar et al., 2019); 1 changes nothing. Between 0.01 and 100.
        stop: texts that end the answer; they are not part of it, and may span tokens.
        seed: makes sampling repeatable, whatever else is in the batch.
        ignore_eos: go on after the end-of-sequence token; for measuring.
        logprobs: log-probabilities of each token and of the so many most likely ones at its place; None asks for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: int = Field(128, gt=0)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    stop: tuple[str, ...] = ()
    seed: int | None = Field(None, ge=0)
    ignore_eos: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)


class Token(NamedTuple):
    """A token at its place: its log-probability in nats, and the most likely tokens there with theirs, best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


Scores = npt.NDArray[np.float64]


class Sampler:
    """Draws one sequence's tokens, with its own random state.

    Args:
        params: how.
        prompt_ids: the prompt, of which a repetition penalty knows.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._params = params
        self._rng = np.random.default_rng(params.seed)
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else None

    def __call__(self, logits: Logits) -> Token:
        """The next token, from (V,) logits."""
        index = self._pick(logits)
        if self._seen is not None:
            self._seen.add(index)
        return Token(index) if self._params.logprobs is None else scored(logits, index, self._params.logprobs)

    def _pick(self, logits: Logits) -> int:
        if self._seen is not None:
            logits = penalised(logits, self._seen, self._params.repetition_penalty)
        if self._params.temperature == 0:
            return int(np.argmax(logits))
        likely = np.flatnonzero(logits >= logits.max() - NEGLIGIBLE * self._params.temperature)
        scores = processed(logits[likely], self._params)
        cumulative = np.cumsum(np.exp(scores - scores.max()))
        return int(likely[np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")])


def penalised(logits: Logits, seen: set[int], penalty: float) -> Logits:
    """Make tokens that were seen less likely, if ``penalty`` is above 1. (V,) in and out."""
    ids = np.fromiter(seen, np.int64, len(seen))
    changed = logits.copy()
    changed[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return changed


def processed(logits: Logits, params: SamplingParams) -> Scores:
    """Logits by temperature, top-k, top-p and min-p: -inf for what may not be drawn. (V,) in and out."""
    with np.errstate(over="ignore"):  # almost no temperature: all but the most likely are out of reach
        scores: Scores = (logits.astype(np.float64) - logits.max()) / params.temperature
    if 0 < params.top_k < len(scores):
        scores[scores < np.partition(scores, -params.top_k)[-params.top_k]] = -np.inf
    if params.top_p < 1:
        scores = nucleus(scores, params.top_p)
    if params.min_p > 0:
        scores[scores < scores.max() + np.log(params.min_p)] = -np.inf
    return scores


def nucleus(scores: Scores, top_p: float) -> Scores:
    """Keep the smallest set of tokens whose probability reaches ``top_p`` (Holtzman et al., 2020). (V,) in and out."""
    weights = np.exp(scores - scores.max())
    order = np.argsort(-weights, kind="stable")
    needed = int(np.searchsorted(np.cumsum(weights[order]), top_p * weights.sum())) + 1
    kept = np.full_like(scores, -np.inf)
    kept[order[:needed]] = scores[order[:needed]]
    return kept


def scored(logits: Logits, index: int, top: int) -> Token:
    """A token with its log-probability, and those of the ``top`` most likely, from (V,) logits."""
    highest = float(logits.max())
    # Exponentials may be single, their sum may not: a vocabulary has many small ones.
    total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = np.argpartition(-logits, min(top, len(logits) - 1))[:top]
    best = best[np.argsort(-logits[best], kind="stable")]
    return Token(index, float(logits[index]) - total, tuple((int(i), float(logits[i]) - total) for i in best))
