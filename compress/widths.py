"""The widths stage: remove the FFN channels and KV groups that are worth least, and refit what they fed.

The calibration tokens go through the present model once per pass; of each layer's statistics only what is worth what
is kept. The cut itself is exact for all that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flabc.errors import StageError
from flabc.spec import LayerSpec

from . import bias
from .allocate import ALLOCATIONS, Pool
from .config import WidthsConfig
from .gram import Gram
from .model import CausalLM, cut_channels, cut_heads
from .restore import refit
from .score import SCORES, Heard
from .stage import Context, Plan, Stage
from .stored import Weight, loaded
from .walk import Walk, dense_variant

#: A kind of unit and a layer that has it.
Place = tuple[str, int]


@dataclass(frozen=True)
class Kind:
    """A kind of unit.

    Args:
        role: the projection that units of this kind feed.
        field: the size in ``LayerSpec`` that counts them.
        cut: the surgery: keeps these units of each layer.
    """

    role: str
    field: str
    cut: Callable[[CausalLM, Mapping[int, Sequence[int]]], CausalLM]

    def units(self, layer: LayerSpec) -> int:
        """How many a layer has."""
        return int(getattr(layer, self.field))


#: What can be narrowed, by the recipe's word for it. A KV group goes with its query heads.
KINDS = {
    "ffn": Kind("down", "intermediate_size", cut_channels),
    "heads": Kind("o", "num_key_value_heads", cut_heads),
}


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
    worth = dict[Place, Tensor]()
    score, gram = SCORES[config.score], SCORES[config.score].gram or config.restore
    if config.rates is None and ALLOCATIONS[config.allocation].ranks:
        listen(
            model, config.of, context, lambda place, heard: worth.update({place: score.worth(heard)}), gram=score.gram
        )
    left = widths(model, config, context, worth)
    if not left:
        return WidthsPlan("widths: the target is reached; nothing to remove")
    keep, errors = dict[Place, tuple[int, ...]](), dict[Place, float]()
    refitted = dict[str, Weight]()

    def choose(place: Place, heard: Heard) -> None:
        scores = worth[place] if place in worth else score.worth(heard)
        kept = scores.topk(left[place]).indices.sort().values
        keep[place] = tuple(kept.tolist())
        inputs = (kept[:, None] * heard.unit + torch.arange(heard.unit, device=kept.device)).flatten()
        role, layer = KINDS[place[0]].role, place[1]
        shifted = bias.name_of(model, role, layer) if config.bias != "none" else None
        cut = cut_projection(heard, inputs, restore=config.restore, bias=shifted is not None)
        if cut.error is not None:
            errors[place] = cut.error
        if config.restore:
            refitted[model.name(role, layer)] = context.keep(cut.weight, model)
        if shifted is not None:
            shift = cut.shift.cpu() + loaded(model.weights[shifted]).float()
            refitted[shifted] = context.keep(shift, model)

    listen(model, config.of, context, choose, left, gram=gram)
    return WidthsPlan(_summary(model, config, left, errors), _details(model, left, errors), keep, refitted, flags)


@dataclass(frozen=True)
class CutProjection:
    """An output projection that lost inputs.

    Args:
        weight: from the inputs that stay, (D, F).
        shift: what the mean output lacks: what a bias has to add, (D,).
        error: the output's error relative to its square, if the Gram matrix was heard.
    """

    weight: Tensor
    shift: Tensor
    error: float | None


def cut_projection(heard: Heard, keep: Tensor, *, restore: bool, bias: bool) -> CutProjection:
    """Take inputs from a projection.

    Args:
        heard: the projection and what it received; with a bias, its Gram matrix is centred in place.
        keep: the inputs that stay.
        restore: refit the weights of those that stay, for which the Gram matrix must have been heard.
        bias: the mean output is made up for by a bias, so that weights need to explain what varies only.
    """
    gram, weight = heard.gram, heard.weight[:, keep]
    whole = None if gram is None else energy(heard.weight, gram)
    if gram is not None and bias:
        gram.addr_(heard.total, heard.total, alpha=-1 / heard.tokens)
    if restore:
        assert gram is not None, "a refit hears the Gram matrix"
        weight = refit(heard.weight, gram, keep).to(weight.dtype)
    mean = heard.total / heard.tokens
    error = None
    if gram is not None:
        gap = heard.weight.clone()
        gap[:, keep] -= weight
        error = energy(gap, gram) / whole if whole else 0.0
    return CutProjection(weight, heard.weight @ mean - weight @ mean[keep], error)


def energy(weight: Tensor, gram: Tensor) -> float:
    """||X Wᵀ||² from the Gram matrix of X alone."""
    return float(((weight @ gram) * weight).sum())


def apply(model: CausalLM, plan: WidthsPlan) -> CausalLM:
    """Cut the units and put the refitted projections in place."""
    model = bias.switched_on(model, plan.flags)
    for name, kind in KINDS.items():
        model = kind.cut(model, {layer: kept for (of, layer), kept in plan.keep.items() if of == name})
    return replace(model, weights={**model.weights, **plan.refitted})


WIDTHS: Stage[WidthsConfig, WidthsPlan] = Stage(plan, apply)


def places(model: CausalLM, kinds: Sequence[str]) -> list[Place]:
    """Every layer that has units of these kinds."""
    return [(name, at) for name in kinds for at, layer in enumerate(model.spec.layers) if KINDS[name].units(layer)]


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
    total = sum(pool.parameters * pool.units for pool in pools)
    if context.spare(model) <= 0:
        return {}
    if config.rates is not None:
        left = _explicit(found, pools, config.rates)
    else:
        left = ALLOCATIONS[config.allocation].allot(pools, _budget(total, config, context, model), config.slope)
    _check_reached(config, context, model, pools, left)
    return {place: units for place, pool, units in zip(found, pools, left, strict=True) if units < pool.units}


def listen(
    model: CausalLM,
    kinds: Sequence[str],
    context: Context,
    tell: Callable[[Place, Heard], None],
    only: Mapping[Place, int] | None = None,
    *,
    gram: bool = True,
) -> None:
    """Send the calibration tokens through the model and tell what each place's projection received.

    Args:
        model: the model.
        kinds: names in ``KINDS``.
        context: has the tokens.
        tell: called once per place, in the order of the layers; what it does not keep is freed.
        only: places that matter; all if None.
        gram: whether the Gram matrices are wanted.
    """
    wanted = [place for place in places(model, kinds) if only is None or place in only]

    @contextmanager
    def listener(layer: int, module: nn.Module) -> Iterator[None]:
        ears = {place: _Ear(model, place, module, context.device, gram) for place in wanted if place[1] == layer}
        yield
        for place, ear in ears.items():
            tell(place, ear.heard())

    Walk(model, context.tokens(model), context.device, context.dtype).run([dense_variant(model.spec)], listener)


class _Ear:
    """Adds up what one projection receives until it is asked."""

    def __init__(self, model: CausalLM, place: Place, module: nn.Module, device: torch.device, gram: bool) -> None:
        name, layer = place
        role = KINDS[name].role
        self.weight = model.tensor(role, layer).to(device).float()
        size = self.weight.shape[1]
        self.unit = size // KINDS[name].units(model.spec.layers[layer])
        self.square, self.total = torch.zeros(2, size, device=device)
        self.gram = Gram(size, device) if gram else None
        self.tokens = 0
        owner = module.get_submodule(model.inner_name(role, layer).removesuffix(".weight"))
        self.handle = owner.register_forward_pre_hook(self._hear)

    def _hear(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2)  # (tokens, F)
        if self.gram is None:
            self.square += x.float().square().sum(0)
        else:
            self.gram.add(x)
        self.total += x.sum(0, dtype=torch.float32)
        self.tokens += len(x)

    def heard(self) -> Heard:
        """What it was, and stop listening."""
        self.handle.remove()
        gram = self.gram.matrix() if self.gram else None
        square = self.square if gram is None else gram.diagonal()
        return Heard(self.weight, square, self.total, self.tokens, self.unit, gram)


def unit_parameters(model: CausalLM, place: Place) -> int:
    """Parameters that one unit of a place costs."""
    name, layer = place
    kind, spec = KINDS[name], model.spec
    shape = spec.layers[layer]
    more = {kind.field: kind.units(shape) + 1}
    if name == "heads":
        more["num_attention_heads"] = shape.num_attention_heads * (kind.units(shape) + 1) // kind.units(shape)
    layers = (*spec.layers[:layer], LayerSpec(**{**shape.model_dump(), **more}), *spec.layers[layer + 1 :])
    return spec.model_copy(update={"layers": layers}).num_parameters - spec.num_parameters


def _pool(model: CausalLM, place: Place, config: WidthsConfig, worth: Tensor | None) -> Pool:
    name, layer = place
    units = KINDS[name].units(model.spec.layers[layer])
    step = config.multiple_of if name == "ffn" else 1
    return Pool(layer, units, unit_parameters(model, place), step, min(step, units), worth)


def _budget(total: int, config: WidthsConfig, context: Context, model: CausalLM) -> float:
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
    return [
        pool.aligned(pool.units * (1 - rates[name][layer])) for (name, layer), pool in zip(found, pools, strict=True)
    ]


def _check_reached(
    config: WidthsConfig, context: Context, model: CausalLM, pools: Sequence[Pool], left: Sequence[int]
) -> None:
    """A stage that takes all that the target still needs has to get there.

    Raises:
        StageError: if it does not.
    """
    gone = sum((pool.units - units) * pool.parameters for pool, units in zip(pools, left, strict=True))
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
