"""The layers stage: remove layers or sub-blocks, one after another, each time the one whose absence costs least.

Greedy removal by the KL between the token logits of the dense model and of the model without the part
(Flab-Pruner, Fang et al., 2024), measured on whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flabc.spec import LayerSpec, ModelSpec

from .config import LayersConfig
from .criteria import CRITERIA
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
class LayersPlan(Plan):
    """Which layers stay, by their old numbers, ascending, and what is left of each layer."""

    keep: tuple[int, ...] = ()
    left: Variant = ()


def plan(model: CausalLM, config: LayersConfig, context: Context) -> LayersPlan:
    """Choose what to remove; fewer parts than asked for where the target needs no more."""
    tokens = context.tokens(model)[: config.sequences]
    walk = Walk(model, tokens, context.device, context.dtype)
    dense = dense_variant(model.spec)
    current, removed = present(model.spec), list[dict[str, Any]]()
    reference = walk.run([dense])[dense]
    spare = context.spare(model)
    for _ in range(wanted(model.spec, config)):
        candidates = {
            variant: step
            for variant, step in steps(current, PARTS[config.parts])
            if _saved(model.spec, current, variant) <= spare
        }
        if not candidates:
            break
        costs = walk.costs(reference, walk.run(candidates), CRITERIA[config.criterion])
        best = min(costs, key=costs.__getitem__)
        layer, part = candidates[best]
        spare -= _saved(model.spec, current, best)
        current = best
        removed.append({"layer": layer, "part": part, config.criterion: round(costs[best], 5)})
    names = ", ".join(f"{entry['layer']}{_SIGNS[entry['part']]}" for entry in removed) or "none"
    total = len(dense) * len(PARTS[config.parts])
    summary = f"layers: remove {len(removed)} of {total} {config.parts.replace('_', '-')} ({names})"
    if removed:
        summary += f"; {config.criterion} {removed[-1][config.criterion]:.4f} per token"
    keep = tuple(index for index, decision in enumerate(current) if not decision.skips)
    return LayersPlan(summary, {"removed": removed, "layers_before": len(dense)}, keep, current)


def apply(model: CausalLM, plan: LayersPlan) -> CausalLM:
    """Remove the sub-blocks, then the layers of which nothing is left, and number the rest anew."""
    attention = [index for index, decision in enumerate(plan.left) if not decision.attention]
    ffn = [index for index, decision in enumerate(plan.left) if not decision.ffn]
    return cut_layers(cut_sub_blocks(model, attention, ffn), plan.keep)


LAYERS: Stage[LayersConfig, LayersPlan] = Stage(plan, apply)


def wanted(spec: ModelSpec, config: LayersConfig) -> int:
    """How many parts the recipe asks to remove."""
    parts = len(spec.layers) * len(PARTS[config.parts])
    return config.count if config.count is not None else round(parts * (config.fraction or 0))


def present(spec: ModelSpec) -> Variant:
    """What each layer of a model has."""
    return tuple(Decision(attention=layer.has_attention, ffn=layer.has_ffn) for layer in spec.layers)


def steps(current: Variant, parts: Sequence[Decision]) -> Iterator[tuple[Variant, tuple[int, str]]]:
    """Every variant one step away, with the layer and the part that goes; the last part of a model stays."""
    for layer, now in enumerate(current):
        for part in parts:
            after = Decision(attention=now.attention and part.attention, ffn=now.ffn and part.ffn)
            variant = without(current, layer, after)
            if after != now and not all(decision.skips for decision in variant):
                yield variant, (layer, _NAMES[part])


def _saved(spec: ModelSpec, before: Variant, after: Variant) -> int:
    """Parameters that go between two variants of a model."""
    return _parameters(spec, before) - _parameters(spec, after)


def _parameters(spec: ModelSpec, variant: Variant) -> int:
    layers = tuple(
        LayerSpec(
            num_attention_heads=layer.num_attention_heads * decision.attention,
            num_key_value_heads=layer.num_key_value_heads * decision.attention,
            intermediate_size=layer.intermediate_size * decision.ffn,
        )
        for layer, decision in zip(spec.layers, variant, strict=True)
    )
    return spec.model_copy(update={"layers": layers}).num_parameters
