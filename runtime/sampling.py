"""From logits to the next token.

Logits are changed in the order in which transformers' ``generate`` lists its processors: repetition penalty,
temperature, top-k, top-p, min-p. Log-probabilities are the model's own, before any of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from flabc.frozen import Frozen

from .backend import Ids, Logits

#: Log-probabilities that may be asked for at each place, as OpenAI's API has it.
MAX_LOGPROBS = 20

#: Temperatures below this are this: float32 has hardly smaller numbers, and nothing but the most likely token is left.
LEAST_TEMPERATURE = 1e-30

#: What may be drawn is looked for first among tokens whose logit is so near to the highest: sorting a whole vocabulary
#: takes long.
LIKELY = (-7.0, -14.0, -28.0, -np.inf)

#: Weights that are summed before a draw looks among them: nobody needs the running sum over a whole vocabulary.
BLOCK = 256


class SamplingParams(Frozen):
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
        scores = tempered(logits, self._params.temperature)
        kept = narrowed(scores, self._params)
        if kept is None:
            return drawn(np.exp(scores), self._rng.random())
        return int(kept[drawn(np.exp(scores[kept]), self._rng.random())])


def penalised(logits: Logits, seen: set[int], penalty: float) -> Logits:
    """Make tokens that were seen less likely, if ``penalty`` is above 1. (V,) in and out."""
    ids = np.fromiter(seen, np.int64, len(seen))
    changed = logits.copy()
    changed[ids] = np.where(logits[ids] < 0, logits[ids] * penalty, logits[ids] / penalty)
    return changed


def tempered(logits: Logits, temperature: float) -> Logits:
    """Logits by temperature, 0 for the most likely token. (V,) in and out."""
    scores: Logits = logits - logits.max()
    with np.errstate(over="ignore"):  # almost no temperature: all but the most likely are out of reach
        scores /= np.float32(max(temperature, LEAST_TEMPERATURE))
    return scores


def narrowed(scores: Logits, params: SamplingParams) -> Ids | None:
    """The tokens that top-k, top-p and min-p leave to be drawn, ascending; None if they leave all.

    Args:
        scores: as ``tempered`` gives them, (V,).
        params: how much they leave; each looks only at what the one before left.
    """
    steps = list[Callable[[Logits], Ids]]()
    if 0 < params.top_k < len(scores):
        steps.append(lambda some: most_likely(some, params.top_k))
    if params.top_p < 1:
        steps.append(lambda some: nucleus(some, params.top_p))
    if params.min_p > 0:
        steps.append(lambda some: np.flatnonzero(some >= np.log(params.min_p)))
    left, kept = scores, None
    for step in steps:
        found = step(left)
        kept, left = found if kept is None else kept[found], left[found]
    return kept


def most_likely(scores: Logits, count: int) -> Ids:
    """Where the ``count`` highest scores are, ascending; all that equal the last of them too. Scores are (V,)."""
    for least in LIKELY:
        likely = np.flatnonzero(scores >= least)
        if len(likely) >= count:
            break
    some = scores[likely]
    found: Ids = likely[some >= np.partition(some, -count)[-count]]
    return found


def nucleus(scores: Logits, top_p: float) -> Ids:
    """Where the smallest set of tokens is whose probability reaches ``top_p`` (Holtzman et al., 2020), ascending.

    Args:
        scores: 0 for the most likely, (V,).
        top_p: below 1.
    """
    weights = np.exp(scores)
    wanted = top_p * float(weights.sum())
    for least in LIKELY:
        likely = np.flatnonzero(scores >= least)
        if weights[likely].sum() >= wanted:
            break
    order = likely[np.argsort(-weights[likely], kind="stable")]
    needed = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted)) + 1
    return np.sort(order[:needed])


def drawn(weights: Logits, at: float) -> int:
    """The token on which a number from 0 up to 1 falls, where each is as wide as its weight. (V,) weights."""
    edges = np.arange(0, len(weights), BLOCK)
    blocks = np.cumsum(np.add.reduceat(weights, edges), dtype=np.float64)
    block = min(int(np.searchsorted(blocks, at * blocks[-1], side="right")), len(blocks) - 1)
    inside = np.cumsum(weights[edges[block] :][:BLOCK], dtype=np.float64)
    rest = at * blocks[-1] - (blocks[block - 1] if block else 0.0)
    # Sums of a block and running sums within it are rounded differently: what falls behind the last takes the last.
    place = min(int(np.searchsorted(inside, rest, side="right")), int(np.searchsorted(inside, inside[-1])))
    return int(edges[block]) + place


def scored(logits: Logits, index: int, top: int) -> Token:
    """A token with its log-probability, and those of the ``top`` most likely, from (V,) logits."""
    highest = float(logits.max())
    # Exponentials may be single, their sum may not: a vocabulary has many small ones.
    total = highest + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    best = np.argpartition(-logits, min(top, len(logits) - 1))[:top]
    best = best[np.argsort(-logits[best], kind="stable")]
    return Token(index, float(logits[index]) - total, tuple((int(i), float(logits[i]) - total) for i in best))
