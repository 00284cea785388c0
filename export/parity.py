"""Parity: does the engine say what the reference says?

The reference is asked first, then the engine the same, so that no more than one is in memory. Both answer prompts of
several lengths, one by one and as a ragged batch, and are led step by step along the reference's own greedy path, so
that one difference does not hide those behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flabc.console import progress
from flabc.errors import ParityError

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

#: Tokens of the greedy continuation.
STEPS = 64

#: Prompt lengths, in tokens.
LENGTHS = (1, 7, 33, 128)

#: Tokens of the longest sequence that is asked about.
LONGEST = max(LENGTHS) + STEPS

#: Largest difference allowed in float32, relative to the largest reference logit.
FP32_TOLERANCE = 1e-4

#: Nats by which a model clearly prefers a token to another. Where it does not, as a tiny random model hardly ever does,
#: rounding may turn them round.
CLEAR = 1.0

#: What tokenizers split in different ways: digits, white space, punctuation, letters beyond ASCII.
ODD_TEXT = "x2 = 1234567.0e-3  # naïve, 漢字 🙂\r\n\n\t if a!=b and not c['key'][::-1]:\n\n\n    don't(**it's)  \n"


def text() -> str:
    """What models are asked about: code, and the same in every version, so that figures can be compared."""
    return Path(__file__).with_name("proof_text.txt").read_text(encoding="utf-8")


class Answers(Protocol):
    """What is compared: a model with a cache. B sequences, S new tokens, V vocab_size."""

    def start(self, batch: int) -> None:
        """Begin ``batch`` new sequences."""
        ...

    def extend(self, ids: Ids, counts: Ids) -> Logits:
        """Append (B, S) ids, of which ``counts`` (B,) are real; logits after the last, (B, V)."""
        ...

    def score(self, ids: Ids) -> Logits:
        """Logits at every position, (B, S, V)."""
        ...


@dataclass
class Parity:
    """How far two models are apart.

    Args:
        positions: logit vectors compared.
        max_relative: the largest absolute difference over the largest absolute reference logit.
        mean_absolute: the mean absolute difference.
        kl: the mean KL(reference || engine) in nats.
        top1_agreement: the share of positions with the same most likely token.
        clearly_wrong: the share of positions at which the engine's most likely token is to the reference less likely
            than its own by more than ``CLEAR``.
        greedy_steps: steps of the greedy continuation compared.
        greedy_mismatches: steps at which the tokens differ although the reference was sure: its two best logits
            are further apart than rounding.
        tolerance: the bound on ``max_relative``; None if weights are rounded, so that other bounds count.
        kl_bound: the bound on ``kl``, None if there is none.
        top1_bound: the least ``top1_agreement``.
        wrong_bound: the most of ``clearly_wrong``.
    """

    positions: int = 0
    max_relative: float = 0.0
    mean_absolute: float = 0.0
    kl: float = 0.0
    top1_agreement: float = 0.0
    clearly_wrong: float = 0.0
    greedy_steps: int = 0
    greedy_mismatches: int = 0
    tolerance: float | None = FP32_TOLERANCE
    kl_bound: float | None = None
    top1_bound: float = 0.0
    wrong_bound: float = 1.0

    @property
    def holds(self) -> bool:
        """Whether the engine may ship."""
        near = self.tolerance is None or (self.max_relative <= self.tolerance and self.greedy_mismatches == 0)
        alike = (self.kl_bound is None or self.kl <= self.kl_bound) and self.top1_agreement >= self.top1_bound
        return near and alike and self.clearly_wrong <= self.wrong_bound

    def receipt(self) -> dict[str, Any]:
        """Plain data, for the manifest."""
        figures = {key: value for key, value in asdict(self).items() if value is not None}
        return {key: float(f"{value:.4g}") for key, value in figures.items()} | {"holds": self.holds}


#: What is asked of an engine, by its precision: nothing but rounding in float32; else how far what it says may be from
#: what the model says, and how often its most likely token must be the model's, or may clearly be another.
BOUNDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"tolerance": None, "kl_bound": 0.001, "top1_bound": 0.98, "wrong_bound": 0.0},
    "bf16": {"tolerance": None, "kl_bound": 0.01, "top1_bound": 0.95, "wrong_bound": 0.0},
    "int8": {"tolerance": None, "kl_bound": 0.02, "top1_bound": 0.9, "wrong_bound": 0.01},
    "int4": {"tolerance": None, "kl_bound": 0.3, "top1_bound": 0.4, "wrong_bound": 0.2},
}


@dataclass(frozen=True)
class Turn:
    """One call of a model, and what it said. B sequences, S tokens, V vocab_size.

    Args:
        ids: (B, S).
        counts: how many of each row are real, (B,); None where every position was scored.
        begins: whether ``ids`` begin new sequences.
        greedy: whether it is a step of the greedy continuation.
        logits: (n, V).
    """

    ids: Ids
    counts: Ids | None
    begins: bool
    greedy: bool
    logits: Logits


def listen(reference: Answers, text_ids: Sequence[int], *, max_batch: int, max_length: int = LONGEST) -> list[Turn]:
    """What a model says of prompts of several lengths, alone and as a ragged batch, and on its own greedy path.

    Two models are compared by ``listen`` to the one and ``check`` of the other, with no more than one in memory.

    Args:
        reference: what an engine was exported from.
        text_ids: token ids of real text, at least ``sum(LENGTHS)`` of them: prompts are cut from it.
        max_batch: sequences that both can hold at once.
        max_length: tokens of a sequence that both can hold; where that is little, less is asked.
    """
    lengths = [length for length in LENGTHS if length <= max_length]
    cuts = np.cumsum([0, *lengths])
    prompts = [np.array([text_ids[begin:end]], np.int64) for begin, end in pairwise(cuts)]
    turns: list[Turn] = []

    def call(ids: Ids, counts: Ids | None, *, begins: bool = False, greedy: bool = False) -> Logits:
        turn = Turn(ids, counts, begins, greedy, np.empty(0, np.float32))
        turns.append(replace(turn, logits=_answer(reference, turn)))
        return turns[-1].logits

    with progress("asking torch", 2 * len(prompts) + 2) as advance:
        for prompt in prompts:
            call(prompt, None)
            advance(1)
            call(prompt, np.array([prompt.shape[1]]), begins=True)
            advance(1)
        rows, counts = _padded(prompts[:max_batch])
        logits = call(rows, counts, begins=True)
        for _ in range(min(4, max_length - rows.shape[1])):
            logits = call(logits.argmax(-1)[:, None], np.ones(len(rows), np.int64))
        advance(1)
        begin = prompts[len(prompts) // 2]
        logits = call(begin, np.array([begin.shape[1]]), begins=True, greedy=True)
        for _ in range(min(STEPS - 1, max_length - begin.shape[1])):
            logits = call(logits.argmax(-1)[:, None], np.array([1]), greedy=True)
        advance(1)
    return turns


def check(engine: Answers, turns: Sequence[Turn], *, precision: str = "fp32") -> Parity:
    """Ask an engine what its reference was asked, and compare.

    Args:
        engine: what was exported.
        turns: what ``listen`` heard of what it was exported from.
        precision: of the engine, a key of ``BOUNDS``.

    Raises:
        ParityError: if the engine is out of bounds; the message has the figures.
    """
    parity = compare(engine, turns, **BOUNDS[precision])
    if not parity.holds:
        raise _out_of_bounds(parity, precision)
    return parity


def compare(model: Answers, turns: Sequence[Turn], **bounds: Any) -> Parity:
    """The same with bounds of the caller's, fields of ``Parity``; nothing is raised."""
    pairs: list[tuple[Logits, Logits]] = []
    with progress("comparing with torch", len(turns)) as advance:
        for turn in turns:
            pairs.append((turn.logits, _answer(model, turn)))
            advance(1)
    steps = [pair for turn, pair in zip(turns, pairs, strict=True) if turn.greedy]
    parity = replace(_measure(pairs), greedy_steps=len(steps), **bounds)
    parity.greedy_mismatches = sum(_differ(a[0], b[0], parity.tolerance or 0.0) for a, b in steps)
    return parity


def _answer(model: Answers, turn: Turn) -> Logits:
    if turn.counts is None:
        scores: Logits = model.score(turn.ids)[0]
        return scores
    if turn.begins:
        model.start(len(turn.ids))
    return model.extend(turn.ids, turn.counts)


def _padded(prompts: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Prompts of (1, S) each as one batch padded behind, and how many tokens of each row are real."""
    counts = np.array([prompt.shape[1] for prompt in prompts])
    ids = np.zeros((len(prompts), int(counts.max())), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.shape[1]] = prompt[0]
    return ids, counts


def _out_of_bounds(parity: Parity, precision: str) -> ParityError:
    if parity.tolerance is None:
        return ParityError(
            f"In {precision} the engine says too little of what the model says.",
            expected=f"a KL of at most {parity.kl_bound:g} nats, the same most likely token at {parity.top1_bound:.0%} "
            f"of the places, clearly another at no more than {parity.wrong_bound:.0%}",
            found=f"{parity.kl:.3g} nats, {parity.top1_agreement:.1%}, {parity.clearly_wrong:.1%}",
            fix="No folder was written. Choose a precision with more bits.",
        )
    return ParityError(
        "The engine does not say what the model says.",
        expected=f"logits within {parity.tolerance:g} of the reference, and the same greedy tokens",
        found=f"a difference of {parity.max_relative:.3g}, {parity.greedy_mismatches} of {parity.greedy_steps} tokens",
        fix="No folder was written. This is a fault in flabc or ONNX Runtime: please report it.",
    )


def _measure(pairs: Sequence[tuple[Logits, Logits]]) -> Parity:
    """A few positions at a time: in float64 all of them would need more memory than the model."""
    largest = max(float(np.abs(a).max()) for a, _ in pairs)
    rows = [_compared(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs]
    worst, absolute, kl, lead = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Parity(
        positions=len(kl),
        max_relative=float(worst.max() / largest),
        mean_absolute=float(absolute.mean()),
        kl=float(kl.mean()),
        top1_agreement=float((lead == 0).mean()),
        clearly_wrong=float((lead > CLEAR).mean()),
    )


def _compared(expected: Floats, found: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Of each position the largest and the mean difference, the KL, and ``_lead``: (n, V) to (n,) each."""
    difference = np.abs(expected - found)
    p, q = _log_softmax(expected), _log_softmax(found)
    kl = (np.exp(p) * (p - q)).sum(-1)
    return np.nan_to_num(difference, nan=np.inf).max(-1), difference.mean(-1), kl, _lead(expected, found)


def _lead(expected: Floats, found: Floats) -> Floats:
    """Nats by which the reference prefers its best token to the other's; 0 where they are one. (n, V) to (n,)."""
    chosen = found.argmax(-1)
    lead: Floats = expected.max(-1) - np.take_along_axis(expected, chosen[:, None], -1)[:, 0]
    # Of two that are alike to the last bit, one is the first: to differ from it is to differ.
    return np.where(chosen == expected.argmax(-1), 0, np.maximum(lead, np.finfo(np.float64).tiny))


def _differ(expected: Logits, found: Logits, tolerance: float) -> bool:
    """Whether the most likely tokens differ and the reference's lead is more than rounding; (V,) each."""
    (lead,) = _lead(expected[None].astype(np.float64), found[None].astype(np.float64))
    return bool(lead > tolerance * float(np.abs(expected).max()))


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
