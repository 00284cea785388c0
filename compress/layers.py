"""The layers stage: remove layers or sub-blocks whose absence costs least, one after another or all at once.

By default greedy removal by the KL between the token logits of the dense model and of the model without the part
(Flab-Pruner, Fang et al., 2024), measured on whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flabc.spec import LayerSpec, ModelSpec

from .config import LayersConfig
from .criteria import CRITERIA, Readouts, Stream
from .model import CausalLM, cut_layers, cut_sub_blocks
from .stage import Context, Plan, Stage
from .walk import GONE, Decision, Variant, Walk, dense_variant, without

NO_ATTENTION, NO_FFN = Decision(attention=False), Decision(ffn=False)

#: How a part is called in receipts, and its sign in the summary.
_NAMES = {GONE: "layer", NO_ATTENTION: "attention", NO_FFN: "ffn"}
_SIGNS = {"layer": "", "attention": "a", "ffn": "f"}

#: What goes at one step, by the recipe's word for it.
PARTS = {
    "layers": (GONE,),
    "attention": (NO_ATTENTION,),
    "ffn": (NO_FFN,),
    "sub_blocks": (NO_ATTENTION, NO_FFN),
}


@dataclass(frozen=True)
class Step:
    """One part that may go: ``span`` layers from ``layer`` on lose it."""

    layer: int
    part: Decision
    span: int = 1

    def applied(self, variant: Variant) -> Variant:
        """The variant without the part."""
        for layer in range(self.layer, self.layer + self.span):
            now = variant[layer]
            left = Decision(attention=now.attention and self.part.attention, ffn=now.ffn and self.part.ffn)
            variant = without(variant, layer, left)
        return variant


#: What each step away from the present variant costs.
Costs = Callable[[Variant, Sequence[Step]], dict[Step, float]]


@dataclass(frozen=True)
class LayersPlan(Plan):
    """Which layers stay, by their old numbers, ascending, and what is left of each layer."""

    keep: tuple[int, ...] = ()
    left: Variant = ()


def plan(model: CausalLM, config: LayersConfig, context: Context) -> LayersPlan:
    """Choose what to remove; fewer parts than asked for where the target needs no more."""
    costs = measure(model, config, context)
    start = present(model.spec)
    chosen = ORDERS[config.order](model, config, context, costs)
    current = start
    for step in chosen:
        current = step.applied(current)
    removed = [
        {"layer": layer, "part": _NAMES[step.part], config.criterion: round(cost, 5)}
        for step, cost in chosen.items()
        for layer in range(step.layer, step.layer + step.span)
    ]
    keep = tuple(index for index, decision in enumerate(current) if not decision.skips)
    return LayersPlan(
        _summary(removed, config, len(start)), {"removed": removed, "layers_before": len(start)}, keep, current
    )


def apply(model: CausalLM, plan: LayersPlan) -> CausalLM:
    """Remove the sub-blocks, then the layers of which nothing is left, and number the rest anew."""
    attention = [index for index, decision in enumerate(plan.left) if not decision.attention]
    ffn = [index for index, decision in enumerate(plan.left) if not decision.ffn]
    return cut_layers(cut_sub_blocks(model, attention, ffn), plan.keep)


LAYERS: Stage[LayersConfig, LayersPlan] = Stage(plan, apply)


def greedy(model: CausalLM, config: LayersConfig, context: Context, costs: Costs) -> dict[Step, float]:
    """One part after another, what is left measured anew each time."""
    current, chosen = present(model.spec), dict[Step, float]()
    for _ in range(wanted(model.spec, config)):
        found = costs(current, fitting(model, context, current, steps(current, PARTS[config.parts])))
        if not found:
            break
        best = min(found, key=found.__getitem__)
        chosen[best], current = found[best], best.applied(current)
    return chosen


def one_shot(model: CausalLM, config: LayersConfig, context: Context, costs: Costs) -> dict[Step, float]:
    """The parts that cost least, each measured alone in the whole model."""
    start = current = present(model.spec)
    found, chosen = costs(start, list(steps(start, PARTS[config.parts]))), dict[Step, float]()
    for step in sorted(found, key=found.__getitem__):
        if len(chosen) < wanted(model.spec, config) and fitting(model, context, current, [step]):
            chosen[step], current = found[step], step.applied(current)
    return chosen


def consecutive(model: CausalLM, config: LayersConfig, context: Context, costs: Costs) -> dict[Step, float]:
    """One run of layers, as long as the recipe and the target let it be."""
    start = present(model.spec)
    part = PARTS[config.parts][0]
    for span in range(min(wanted(model.spec, config), len(start) - 1), 0, -1):
        runs = [Step(layer, part, span) for layer in range(len(start) - span + 1)]
        if found := costs(start, fitting(model, context, start, runs)):
            best = min(found, key=found.__getitem__)
            return {best: found[best]}
    return {}


#: The order of removal, by the recipe's word for it.
ORDERS = {"greedy": greedy, "one_shot": one_shot, "consecutive": consecutive}


def measure(model: CausalLM, config: LayersConfig, context: Context) -> Costs:
    """How the recipe's criterion measures steps: by whole variants, or by the residual stream of the present one."""
    walk = Walk(model, context.tokens(model)[: config.sequences], context.device, context.dtype)
    criterion = CRITERIA[config.criterion]
    return _by_stream(walk, criterion) if isinstance(criterion, Stream) else _by_readouts(walk, criterion)


def _by_readouts(walk: Walk, criterion: Readouts) -> Costs:
    dense = dense_variant(walk.model.spec)
    reference = walk.run([dense])[dense]

    def costs(current: Variant, among: Sequence[Step]) -> dict[Step, float]:
        variants = {step: step.applied(current) for step in among}
        found = walk.costs(reference, walk.run(variants.values()), criterion.cost) if among else {}
        return {step: found[variant] for step, variant in variants.items()}

    return costs


def _by_stream(walk: Walk, criterion: Stream) -> Costs:
    def costs(current: Variant, among: Sequence[Step]) -> dict[Step, float]:
        states = dict(walk.stream(current)) if among else {}
        return {step: float(criterion.cost(*_around(step, states)).float().mean()) for step in among}

    return costs


def _around(step: Step, states: Mapping[int, tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The residual stream before and after what a step removes, (N, T, D) each."""
    before, between, _ = states[step.layer]
    after = states[step.layer + step.span - 1][2]
    if step.part == NO_ATTENTION:
        return before, between
    return (between, after) if step.part == NO_FFN else (before, after)


def wanted(spec: ModelSpec, config: LayersConfig) -> int:
    """How many parts the recipe asks to remove: as many as the target lets go where it does not say."""
    parts = len(spec.layers) * len(PARTS[config.parts])
    if config.count is None and config.fraction is None:
        return parts
    return config.count if config.count is not None else round(parts * (config.fraction or 0))


def present(spec: ModelSpec) -> Variant:
    """What each layer of a model has."""
    return tuple(Decision(attention=layer.has_attention, ffn=layer.has_ffn) for layer in spec.layers)


def steps(current: Variant, parts: Sequence[Decision]) -> Iterator[Step]:
    """Every step that takes something away; the last part of a model stays."""
    for layer in range(len(current)):
        for part in parts:
            after = Step(layer, part).applied(current)
            if after != current and not all(decision.skips for decision in after):
                yield Step(layer, part)


def fitting(model: CausalLM, context: Context, current: Variant, among: Iterable[Step]) -> list[Step]:
    """The steps that do not go below the target."""
    least = context.target_parameters or 0
    return [step for step in among if parameters_of(model.spec, step.applied(current)) >= least]


def parameters_of(spec: ModelSpec, variant: Variant) -> int:
    """Parameters of a variant of a model."""
    layers = tuple(
        LayerSpec(
            num_attention_heads=layer.num_attention_heads * decision.attention,
            num_key_value_heads=layer.num_key_value_heads * decision.attention,
            intermediate_size=layer.intermediate_size * decision.ffn,
        )
        for layer, decision in zip(spec.layers, variant, strict=True)
    )
    return spec.model_copy(update={"layers": layers}).num_parameters


def _summary(removed: Sequence[Mapping[str, Any]], config: LayersConfig, layers: int) -> str:
    names = ", ".join(f"{entry['layer']}{_SIGNS[entry['part']]}" for entry in removed) or "none"
    total = layers * len(PARTS[config.parts])
    summary = f"layers: remove {len(removed)} of {total} {config.parts.replace('_', '-')} ({names})"
    return summary + (f"; {config.criterion} {removed[-1][config.criterion]:.4f}" if removed else "")
