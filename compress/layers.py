"""The layers stage: remove whole layers, one after another, each time the one whose absence costs least.

Greedy removal by the KL between the token logits of the dense model and of the model without the layer
(Flab-Pruner, Fang et al., 2024), measured on whole sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flabc.spec import ModelSpec

from .config import LayersConfig
from .criteria import CRITERIA
from .model import CausalLM, cut_layers
from .stage import Context, Plan, Stage
from .walk import Walk, dense_variant, without


@dataclass(frozen=True)
class LayersPlan(Plan):
    """Which layers stay, by their old numbers, ascending."""

    keep: tuple[int, ...] = ()


def plan(model: CausalLM, config: LayersConfig, context: Context) -> LayersPlan:
    """Choose the layers to remove; fewer than asked for where the target needs no more."""
    tokens = context.tokens(model)[: config.sequences]
    walk = Walk(model, tokens, context.device, context.dtype)
    current = dense = dense_variant(model.spec)
    keep, removed = list(range(len(dense))), list[dict[str, Any]]()
    reference = walk.run([dense])[dense]
    spare = context.spare(model)
    for _ in range(wanted(model.spec, config)):
        candidates = {without(current, layer): layer for layer in keep if _size(model.spec, layer) <= spare}
        if not candidates or len(keep) == 1:
            break
        costs = walk.costs(reference, walk.run(candidates), CRITERIA[config.criterion])
        current = min(costs, key=costs.__getitem__)
        layer = candidates[current]
        spare -= _size(model.spec, layer)
        keep.remove(layer)
        removed.append({"layer": layer, config.criterion: round(costs[current], 5)})
    names = ", ".join(str(entry["layer"]) for entry in removed) or "none"
    summary = f"layers: remove {len(removed)} of {len(dense)} ({names})"
    if removed:
        summary += f"; {config.criterion} {removed[-1][config.criterion]:.4f} per token"
    return LayersPlan(summary, {"removed": removed, "layers_before": len(dense)}, tuple(keep))


def apply(model: CausalLM, plan: LayersPlan) -> CausalLM:
    """Remove the layers and number the rest anew."""
    return cut_layers(model, plan.keep)


LAYERS: Stage[LayersConfig, LayersPlan] = Stage(plan, apply)


def wanted(spec: ModelSpec, config: LayersConfig) -> int:
    """How many layers the recipe asks to remove."""
    return config.count if config.count is not None else round(len(spec.layers) * (config.fraction or 0))


def _size(spec: ModelSpec, layer: int) -> int:
    """Parameters of one layer."""
    alone = spec.model_copy(update={"layers": (spec.layers[layer],)})
    two = spec.model_copy(update={"layers": (spec.layers[layer],) * 2})
    return two.num_parameters - alone.num_parameters
