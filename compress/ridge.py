"""Ridge regression that chooses its damping by text that it did not hear.

With some ten tokens to an input, as calibration has them, a fit that is hardly damped says the calibration text by
heart, and is worse than none on any other. How much is right depends on the layer, the cut and the text. So a part of
the tokens is put aside: what explains these best is the damping, and then all tokens are fitted to.

Letters in shape comments: F inputs, D outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .gram import Gram, pieces

#: Dampings to choose among, as shares of each input's own variance.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

#: Where the choice begins; a choice begins best where the last one of its kind ended.
FIRST = 1.0

#: What every input is damped by beside, as a share of its square: more than sums of float32 products are wrong by.
ROUNDING = 1e-4

#: Dampings are compared on so many random mixtures of the outputs, which tell as much as all of them.
MIXTURES = 64

#: Of each so many texts one is put aside, in turn another one, since corpora and openings lie in turns too. Of fewer
#: texts it is as large a part of each, at its end.
ASIDE = 4


@dataclass(frozen=True)
class Fit:
    """What explains the outputs best.

    Args:
        change: Δ, (D, F), float32.
        shift: δ, (D,), float32; nought without an intercept.
        damping: what was chosen or given; None if what was put aside is explained best by no change at all.
    """

    change: Tensor
    shift: Tensor
    damping: float | None

    @property
    def changes(self) -> bool:
        """Whether there is anything to change."""
        return bool(self.change.any() or self.shift.any())


class Ridge:
    """Sums over tokens, of those that are fitted to and of those put aside.

    Args:
        inputs: F.
        outputs: D.
        device: where to compute.
        intercept: fit a shift of the outputs too.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device, *, intercept: bool = False) -> None:
        size = inputs + intercept
        self.intercept = intercept
        self._grams = [Gram(size, device) for _ in range(2)]
        self._rights = [torch.zeros(size, outputs, device=device) for _ in range(2)]

    def add(self, inputs: Tensor, outputs: Tensor, scale: Tensor | None = None, *, aside: bool = False) -> None:
        """Add tokens.

        Args:
            inputs: X, (tokens, F).
            outputs: Y, (tokens, D).
            scale: what a token's error is multiplied by before it is squared, (tokens, 1). By a power of two bfloat16
                inputs are multiplied exactly.
            aside: these are to check the fit by.
        """
        if self.intercept:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        if scale is not None:
            inputs, outputs = inputs * scale.to(inputs.dtype), outputs * scale
        self._grams[aside].add(inputs)
        for part, wanted in zip(pieces(inputs), pieces(outputs), strict=True):
            self._rights[aside].addmm_(part.T, wanted)

    def fit(self, damping: float | None = None, first: float = FIRST) -> Fit:
        """Minimise Σ ||y - Δx - δ||² + λ Σ v_f ||Δ_f||² over Δ and δ, with v_f the sum of squares of input f.

        With an intercept these are squares of its distance from its mean. The sums are used up.

        Args:
            damping: λ; chosen among ``DAMPINGS`` if None.
            first: where a choice begins, one of ``DAMPINGS``.
        """
        gram, aside = (each.matrix() for each in self._grams)
        self._grams.clear()
        if damping is None:
            damping = self._chosen(gram, aside, first)
        right = self._rights[0].add_(self._rights[1])
        if damping is None:
            solution = torch.zeros_like(right)
        else:
            gram += aside
            del aside
            solution = self._solved(gram, right, damping)
        shift = solution[-1] if self.intercept else solution.new_zeros(solution.shape[1])
        return Fit(solution[: len(solution) - self.intercept].T, shift, damping)

    def _chosen(self, gram: Tensor, aside: Tensor, first: float) -> float | None:
        """The damping whose fit explains best what was put aside, None if none explains any of it.

        From the first one up or down, as long as it gets better: errors have one minimum as a rule, and each is a
        factorisation.
        """
        mixtures = _signs(self._rights[0].shape[1], gram.device)
        fitted, wanted = (right @ mixtures for right in self._rights)

        @cache
        def lost(at: int) -> float:
            """||Y - XΔᵀ||² of what was put aside, less ||Y||²."""
            change = self._solved(gram, fitted, DAMPINGS[at])
            return float((change * (aside @ change - 2 * wanted)).sum())

        at = DAMPINGS.index(first)
        while (best := min((each for each in (at, at - 1, at + 1) if 0 <= each < len(DAMPINGS)), key=lost)) != at:
            at = best
        return DAMPINGS[at] if lost(at) < 0 else None

    def _solved(self, gram: Tensor, right: Tensor, damping: float) -> Tensor:
        """(G + λV)⁻¹ R, (F, ...), float32, solved in float64; with an intercept that is the last row."""
        left, wanted = gram.double(), right.double()
        squares = left.diagonal().clone()
        if self.intercept:
            # Without it first: all distances are from the means.
            total, count, outputs = left[-1, :-1].clone(), left[-1, -1].clone(), wanted[-1].clone()
            left, squares = left[:-1, :-1].addr_(total, total, alpha=-1 / float(count)), squares[:-1]
            wanted = wanted[:-1].addr_(total, outputs, alpha=-1 / float(count))
        # Sums in float32 leave of an input that never varies its rounding, and of one that is always nought nothing.
        added = damping * left.diagonal().clamp(min=0) + ROUNDING * squares
        added[added == 0] = 1.0
        left.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(left)
        while failed and added.isfinite().all():  # many inputs that never vary, whose rounding adds up to more
            added *= 10
            left.diagonal().add_(added)
            factor, failed = torch.linalg.cholesky_ex(left)
        columns = wanted.split(MIXTURES, 1)  # type: ignore[no-untyped-call]
        change = torch.cat([torch.cholesky_solve(part, factor).float() for part in columns], 1)
        if not self.intercept:
            return change
        shift = (outputs - total @ change.double()) / count
        return torch.cat([change, shift.float()[None]])


def parts(texts: int, length: int, more: int = 0) -> Iterator[tuple[slice, bool]]:
    """The tokens of texts, one text after another, and whether they are to be put aside; some slices may be empty.

    Args:
        texts: how many.
        length: tokens of each.
        more: tokens behind them that are fitted to.
    """
    if texts < ASIDE:
        for start in range(0, texts * length, length):
            middle = start + length * (ASIDE - 1) // ASIDE
            yield slice(start, middle), False
            yield slice(middle, start + length), True
    else:
        fitted = 0
        for group in range(texts // ASIDE):
            aside = length * (ASIDE * group + (group + group // ASIDE) % ASIDE)
            yield slice(fitted, aside), False
            yield slice(aside, aside + length), True
            fitted = aside + length
        yield slice(fitted, texts * length), False
    if more:
        yield slice(texts * length, texts * length + more), False


def _signs(outputs: int, device: torch.device) -> Tensor:
    """Random mixtures of outputs, (D, ``MIXTURES``), always the same."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(2, (outputs, MIXTURES), generator=generator) * 2.0 - 1.0).to(device)
