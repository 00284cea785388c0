"""What narrowing one layer costs the whole model, for all layers and several widths in one walk.

The error that a cut makes in its layer says little about what the model says in the end. So every place is cut to a few
widths, refitted, and put in alone: each is a variant, and all ride on one walk. Between these widths the cost is taken
to be convex. Knowing the costs of levels before choosing among them is the way of SPDY (Frantar and Alistarh, 2022) and
ZipLM (Kurtic et al., 2023); the measure is Flab-Pruner's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .config import WidthsConfig
from .criteria import kl
from .model import CausalLM
from .score import SCORES, Heard
from .stage import Context
from .stored import loaded
from .units import KINDS, Cut, Place, cut_place, listen
from .walk import Decision, Narrow, Walk, dense_variant, without

#: Shares of a place's units that are taken away in turn.
SHARES = (1 / 8, 1 / 4, 1 / 2, 3 / 4)

#: Units removed, and the KL that it costs.
Curve = Sequence[tuple[int, float]]

#: What a place becomes at each number of units left.
Levels = Mapping[Place, Mapping[int, Cut]]


def curves(
    model: CausalLM, config: WidthsConfig, context: Context, tokens: Tensor, worth: dict[Place, Tensor]
) -> dict[Place, Curve]:
    """The KL between what the model says and what it says with one place narrowed.

    Args:
        model: the model to cut.
        config: the recipe's stage.
        context: where to compute.
        tokens: what projections are heard on, (N, T); the first ``config.sequences`` are compared on.
        worth: filled with the score of each unit of each place, by which the units go.
    """
    # Without biases: what is compared are layers with each other.
    refitted = SCORES[config.score].gram or config.restore
    levels = levels_of(model, config, context, tokens, worth, _shares, restore=refitted, bias=False)
    walk = Walk(model, tokens[: config.sequences], context.device, context.dtype, narrower(levels))
    dense = dense_variant(model.spec)
    variants = {
        (place, left): without(dense, place[1], Decision(narrowed=((place[0], left),)))
        for place, cuts in levels.items()
        for left in cuts
    }
    states = walk.run([dense, *variants.values()])
    costs = walk.costs(states.pop(dense), states, kl)
    return {
        place: [(len(scores) - left, costs[variants[place, left]]) for left in levels[place]]
        for place, scores in worth.items()
    }


def marginal_worth(scores: Tensor, curve: Curve) -> Tensor:
    """What each unit adds to the KL when it goes in its turn, (U,): the slope of a convex curve through the levels.

    Args:
        scores: by which the units go, the least first, (U,).
        curve: units removed and KL, in ascending order.
    """
    units = len(scores)
    if not curve:  # of one unit there is no level, nor may it go
        return torch.full((units,), torch.inf, dtype=torch.float64)
    hull = _convex([(0, 0.0), *((gone, max(cost, 0.0)) for gone, cost in curve)])
    middles = np.array([0.0, *((a[0] + b[0]) / 2 for a, b in pairwise(hull))])
    slopes = np.array([0.0, *((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(hull))])
    turns = np.arange(units) + 0.5
    found = np.interp(turns, middles, slopes)
    beyond = turns > middles[-1]  # as steep as between the last two
    found[beyond] += (turns[beyond] - middles[-1]) * (slopes[-1] - slopes[-2]) / (middles[-1] - middles[-2])
    found += 1e-12 * np.arange(1, units + 1)  # those that cost alike go in their order
    worth = torch.empty(units, dtype=torch.float64)
    worth[scores.argsort().cpu()] = torch.from_numpy(found)
    return worth


def _shares(_: Place, units: int) -> list[int]:
    """The numbers of units left when each share is gone in its turn."""
    left = dict.fromkeys(units - round(share * units) for share in SHARES)
    return [number for number in sorted(left, reverse=True) if 0 < number < units]


def _convex(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of points in ascending order: no step costs less than the one before."""
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def levels_of(
    model: CausalLM,
    config: WidthsConfig,
    context: Context,
    tokens: Tensor,
    worth: dict[Place, Tensor],
    sizes: Callable[[Place, int], Iterable[int]],
    *,
    restore: bool,
    bias: bool,
) -> dict[Place, dict[int, Cut]]:
    """What each place becomes when it keeps fewer of its units.

    Args:
        model: the model to cut.
        config: the recipe's stage.
        context: where to compute.
        tokens: what projections are heard on, (N, T).
        worth: filled with the score of each unit of each place, by which the units go.
        sizes: of a place and its number of units, the numbers that stay in turn, each fewer and more than none.
        restore: refit the projections.
        bias: make up for the mean by the biases that there are.
    """
    score, levels = SCORES[config.score], dict[Place, dict[int, Cut]]()
    gram = score.gram or restore

    def tell(place: Place, heard: Heard) -> None:
        scores = worth[place] = score.worth(heard)
        levels[place] = {}
        for left in sizes(place, len(scores)):
            # With a bias a cut centres the Gram matrix, which the next one needs as it was.
            once = replace(heard, gram=heard.gram.clone()) if bias and heard.gram is not None else heard
            cut = cut_place(model, place, once, scores, left, restore=restore, bias=bias)
            levels[place][left] = cut.kept(lambda tensor: context.keep(tensor, model))

    listen(model, config.of, tokens, context, tell, gram=gram)
    return levels


def narrower(levels: Levels) -> Narrow:
    """How the walk narrows a layer that it has fetched."""

    def narrow(model: CausalLM, layer: int, decision: Decision) -> CausalLM:
        for kind, left in decision.narrowed:
            cut = levels[kind, layer][left]
            like = loaded(next(iter(model.weights.values())))
            refitted = {name: loaded(tensor).to(like) for name, tensor in cut.refitted.items()}
            model = KINDS[kind].cut(model, {layer: cut.keep})
            model = replace(model, weights={**model.weights, **refitted})
        return model

    return narrow
