"""The widths stage: remove the FFN channels and KV groups that are worth least, and refit what they fed.

The calibration tokens go through the present model once per pass; of each layer's statistics only what is worth what
is kept. The cut itself is exact for all that stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from flabc.errors import StageError

from . import bias
from .allocate import ALLOCATIONS, Pool
from .config import WidthsConfig
from .model import CausalLM, cut_layers, cut_sub_blocks
from .score import SCORES, Heard
from .sensitivity import curves, marginal_worth
from .stage import Context, Plan, Stage
from .stored import Weight
from .units import KINDS, Cut, Place, cut_place, listen, places, unit_parameters


@dataclass(frozen=True)
class WidthsPlan(Plan):
    """Which units of each place stay, ascending, and what takes the place of what.

    Args:
        keep: the units of each place that loses any.
        refitted: new tensors by their checkpoint names: output projections, (D, F), and their biases, (D,).
        flags: config flags that are switched on first, for the biases.
    """

    keep: Mapping[Place, tuple[int, ...]] = field(default_factory=dict)
    refitted: Mapping[str, Weight] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


def plan(model: CausalLM, config: WidthsConfig, context: Context) -> WidthsPlan:
    """Choose the units to keep.

    Raises:
        StageError: if nothing says how many to remove, or the target cannot be reached this way.
    """
    flags = bias.addable(model, [KINDS[name].role for name in config.of]) if config.bias == "add" else ()
    model = bias.switched_on(model, flags)
    worth = _worth(model, config, context)
    left = widths(model, config, context, worth)
    if not left:
        return WidthsPlan("widths: the target is reached; nothing to remove")
    score, cuts = SCORES[config.score], dict[Place, Cut]()

    def choose(place: Place, heard: Heard) -> None:
        going = KINDS[place[0]].units(model.spec.layers[place[1]]) - left[place]
        scores = worth[place] if place in worth else score.worth(replace(heard, going=going))
        cut = cut_place(model, place, heard, scores, left[place], restore=config.restore, bias=config.bias != "none")
        cuts[place] = cut.kept(lambda tensor: context.keep(tensor, model))

    cuts |= {place: Cut((), {}, None) for place, units in left.items() if not units}
    narrowed = {place: units for place, units in left.items() if units}
    # What each unit is worth is known already where units were ranked across places.
    gram = config.restore or (score.gram and not worth)
    listen(model, config.of, context.tokens(model), context, choose, narrowed, gram=gram)
    errors = {place: cut.error for place, cut in cuts.items() if cut.error is not None}
    return WidthsPlan(
        _summary(model, config, left, errors),
        _details(model, left, errors),
        {place: cut.keep for place, cut in cuts.items()},
        {name: tensor for cut in cuts.values() for name, tensor in cut.refitted.items()},
        flags,
    )


def _worth(model: CausalLM, config: WidthsConfig, context: Context) -> dict[Place, Tensor]:
    """What each unit of each place is worth, if the allocation ranks units across places: by its score, or in KL."""
    allocation, score = ALLOCATIONS[config.allocation], SCORES[config.score]
    worth = dict[Place, Tensor]()
    if config.rates is not None or not allocation.ranks:
        return worth
    tokens = context.tokens(model)
    if allocation.measured:
        found = curves(model, config, context, tokens, worth)
        return {place: marginal_worth(scores, found[place]) for place, scores in worth.items()}

    def tell(place: Place, heard: Heard) -> None:
        worth[place] = score.worth(heard)

    listen(model, config.of, tokens, context, tell, gram=score.gram)
    return worth


def apply(model: CausalLM, plan: WidthsPlan) -> CausalLM:
    """Cut the units, put the refitted projections in place, and remove the sub-blocks and layers that keep nothing."""
    model = bias.switched_on(model, plan.flags)
    for name, kind in KINDS.items():
        model = kind.cut(model, {layer: kept for (of, layer), kept in plan.keep.items() if of == name and kept})
    model = replace(model, weights={**model.weights, **plan.refitted})
    gone = {name: [layer for (of, layer), kept in plan.keep.items() if of == name and not kept] for name in KINDS}
    model = cut_sub_blocks(model, gone["heads"], gone["ffn"])
    keep = [at for at, layer in enumerate(model.spec.layers) if layer.has_attention or layer.has_ffn]
    return model if len(keep) == len(model.spec.layers) else cut_layers(model, keep)


WIDTHS: Stage[WidthsConfig, WidthsPlan] = Stage(plan, apply)


def widths(model: CausalLM, config: WidthsConfig, context: Context, worth: Mapping[Place, Tensor]) -> dict[Place, int]:
    """The units left in each place that loses any: by the rate, or by what the target still needs.

    Args:
        model: the model to cut.
        config: the recipe's stage.
        context: knows the target.
        worth: of each unit of each place, if the allocation ranks units across places.

    Raises:
        StageError: if nothing says how much to remove, or even the narrowest model is above the target.
    """
    found = places(model, config.of)
    pools = [_pool(model, place, config, worth.get(place)) for place in found]
    total = sum(pool.price * pool.units for pool in pools)
    if context.spare(model) <= 0:
        return {}
    if config.rates is not None:
        left = _explicit(found, pools, config.rates)
        _check_something_stays(model, found, left)
        _check_not_beyond(model, context, pools, left)
    else:
        left = ALLOCATIONS[config.allocation].allot(pools, to_remove(total, config, context, model), config.slope)
    _check_reached(config, context, model, pools, left)
    return {place: units for place, pool, units in zip(found, pools, left, strict=True) if units < pool.units}


def _pool(model: CausalLM, place: Place, config: WidthsConfig, worth: Tensor | None) -> Pool:
    name, layer = place
    units = KINDS[name].units(model.spec.layers[layer])
    step = config.multiple_of if name == "ffn" else 1
    return Pool(layer, units, unit_parameters(model, place), step, min(step, units), worth)


def to_remove(total: int, config: WidthsConfig, context: Context, model: CausalLM) -> float:
    """Parameters to remove.

    Raises:
        StageError: if neither the recipe's stage nor its target says.
    """
    if config.rate is not None:
        return min(context.spare(model), config.rate * total)
    if context.target_parameters is None:
        raise StageError(
            "The widths stage does not know how much to remove.",
            fix="Give it a 'rate' or 'rates', or give the recipe a 'target'.",
        )
    return context.spare(model)


def _explicit(found: Sequence[Place], pools: Sequence[Pool], rates: Mapping[Any, Sequence[float]]) -> list[int]:
    """The units left by a rate for each layer of each kind.

    Raises:
        StageError: if a kind has more or fewer rates than the model has layers.
    """
    for name, layer in found:
        if layer >= len(rates.get(name, ())):
            raise StageError(
                f"The widths stage has no rate for the {name} of layer {layer}.",
                expected="one rate per layer for each kind in 'of'",
                found=f"{len(rates.get(name, ()))} rates for {name}",
            )
    return [_kept(pool, rates[name][layer]) for (name, layer), pool in zip(found, pools, strict=True)]


def _kept(pool: Pool, rate: float) -> int:
    """The units that one rate leaves: all of them at 0, none at 1."""
    if rate in (0, 1):
        return pool.units * (rate == 0)
    return pool.aligned(pool.units * (1 - rate))


def _check_something_stays(model: CausalLM, found: Sequence[Place], left: Sequence[int]) -> None:
    """A model has at least one sub-block.

    Raises:
        StageError: if the rates take them all.
    """
    if not any(left) and len(found) == len(places(model, list(KINDS))):
        raise StageError("The rates remove every sub-block of the model.", expected="one rate below 1")


def _check_not_beyond(model: CausalLM, context: Context, pools: Sequence[Pool], left: Sequence[int]) -> None:
    """Rates may not take more than a target leaves to be taken, but for the step that widths are rounded by.

    Raises:
        StageError: if they do.
    """
    gone = sum((pool.units - units) * pool.price for pool, units in zip(pools, left, strict=True))
    if gone - max(pool.step * pool.price for pool in pools) > context.spare(model):
        share = (model.spec.num_parameters - gone) / context.dense.spec.num_parameters
        raise StageError(
            "The widths stage's 'rates' remove more than the target allows.",
            expected=f"at most {context.spare(model):,} parameters to remove",
            found=f"{gone:,}, which leaves {share:.1%} of the dense model",
            fix="Leave 'rates' or 'target' away, or search for rates anew: flabc search --target.",
        )


def _check_reached(
    config: WidthsConfig, context: Context, model: CausalLM, pools: Sequence[Pool], left: Sequence[int]
) -> None:
    """A stage that takes all that the target still needs has to get there.

    Raises:
        StageError: if it does not.
    """
    gone = sum((pool.units - units) * pool.price for pool, units in zip(pools, left, strict=True))
    if config.takes_the_rest and gone < context.spare(model):
        nearest = (model.spec.num_parameters - gone) / context.dense.spec.num_parameters
        raise StageError(
            f"The target would leave less than the narrowest {' and '.join(config.of)}.",
            expected=f"{context.spare(model):,} parameters to remove",
            found=f"{gone:,}; the nearest target is params={nearest:.3f}",
            fix="Raise the target, or let another stage remove more.",
        )


def _details(model: CausalLM, left: Mapping[Place, int], errors: Mapping[Place, float]) -> dict[str, Any]:
    """For the receipt: sizes per layer before and after, and the output error of each layer that lost units."""
    kinds = dict.fromkeys(name for name, _ in left)
    return {
        name: {
            "before": [KINDS[name].units(layer) for layer in model.spec.layers],
            "after": [left.get((name, at), KINDS[name].units(layer)) for at, layer in enumerate(model.spec.layers)],
            "relative_output_error": {
                str(layer): round(error, 5) for (of, layer), error in errors.items() if of == name
            },
        }
        for name in kinds
    }


def _summary(model: CausalLM, config: WidthsConfig, left: Mapping[Place, int], errors: Mapping[Place, float]) -> str:
    words = list[str]()
    for name in dict.fromkeys(of for of, _ in left):
        before = [KINDS[name].units(layer) for layer in model.spec.layers]
        after = [left.get((name, at), units) for at, units in enumerate(before)]
        span = f"{min(after)}" if min(after) == max(after) else f"{min(after)} to {max(after)}"
        words.append(f"{name} {max(before)} → {span}")
    summary = f"widths: {', '.join(words)}{', refitted' * config.restore}"
    return summary + (f"; output error {sum(errors.values()) / len(errors):.2%} a layer" if errors else "")
