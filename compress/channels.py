"""The FFN stage: remove the channels that are worth least, and refit the output projection to the dense output.

One walk with one variant hears every layer's FFN; the cut itself is exact for the channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flabc.console import track
from flabc.errors import StageError

from .config import FFNConfig
from .model import CausalLM, cut_channels
from .restore import refit
from .score import SCORES, Heard
from .stage import Context, Plan, Stage
from .walk import Walk, dense_variant


@dataclass(frozen=True)
class FFNPlan(Plan):
    """Which channels of each layer stay, ascending, and the refitted output projections, if any."""

    keep: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    down: Mapping[int, Tensor] = field(default_factory=dict)


def plan(model: CausalLM, config: FFNConfig, context: Context) -> FFNPlan:
    """Choose the channels to keep in every layer that has an FFN.

    Raises:
        StageError: if neither a rate nor a target says how many to remove, or no channel would be left.
    """
    widths = target_widths(model, config, context)
    if not widths:
        return FFNPlan("ffn: the target is reached; nothing to remove")
    heard = listen(model, context)
    keep, down, errors = {}, {}, []
    for layer, width in track(widths.items(), "choosing channels", len(widths)):
        scores = SCORES[config.score](heard[layer])
        kept = scores.topk(width).indices.sort().values
        keep[layer] = tuple(kept.tolist())
        weight = heard[layer].down
        if config.restore:
            down[layer] = refit(weight, heard[layer].gram, kept)
        errors.append(output_error(weight, down.get(layer, weight[:, kept]), kept, heard[layer].gram))
    before = max(spec.intermediate_size for spec in model.spec.layers)
    after = max(widths.values())
    details: dict[str, Any] = {
        "intermediate_size_before": before,
        "intermediate_size": after,
        "relative_output_error": [round(error, 5) for error in errors],
    }
    mean = sum(errors) / len(errors)
    refitted = ", refitted" if config.restore else ""
    return FFNPlan(f"ffn: {before} → {after} channels{refitted}; output error {mean:.2%} a layer", details, keep, down)


def apply(model: CausalLM, plan: FFNPlan) -> CausalLM:
    """Cut the channels and put the refitted projections in place."""
    cut = cut_channels(model, plan.keep)
    refitted = {cut.name("down", layer): tensor.to(cut.dtype) for layer, tensor in plan.down.items()}
    return replace(cut, weights={**cut.weights, **refitted})


FFN: Stage[FFNConfig, FFNPlan] = Stage(plan, apply)


def target_widths(model: CausalLM, config: FFNConfig, context: Context) -> dict[int, int]:
    """The width left in each layer with an FFN: by the rate, or by what the target still needs; {} for no cut.

    Raises:
        StageError: if nothing says how much to remove, or no channel would be left.
    """
    layers = {index: spec.intermediate_size for index, spec in enumerate(model.spec.layers) if spec.has_ffn}
    per_channel = sum(channel_parameters(model, layer) for layer in layers) / len(layers)
    if config.rate is None and context.target_parameters is None:
        raise StageError(
            "The ffn stage does not know how much to remove.",
            fix="Give it a 'rate', or give the recipe a 'target'.",
        )
    if context.spare(model) <= 0:
        return {}
    spare = context.spare(model) / (per_channel * len(layers))  # channels a layer may lose
    widths = {}
    for layer, width in layers.items():
        lost = spare if config.rate is None else min(spare, config.rate * width)
        widths[layer] = min(width, _aligned(width - lost, config.multiple_of))
    if min(widths.values()) <= 0:
        raise StageError(
            "The target would leave no FFN channels.",
            found=f"{context.spare(model):,} parameters still to remove",
            fix="Raise target.params, or let an earlier stage remove more.",
        )
    return {} if widths == layers else widths


def listen(model: CausalLM, context: Context) -> dict[int, Heard]:
    """What every layer's output projection receives on the calibration tokens."""
    heard: dict[int, Heard] = {}

    def listener(layer: int, module: nn.Module) -> Any:
        name = model.inner_name("down", layer).removesuffix(".weight")
        width = model.spec.layers[layer].intermediate_size
        gram = torch.zeros(width, width, device=context.device)
        total = torch.zeros(width, device=context.device)
        count = 0

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal count
            x = inputs[0].reshape(-1, width).float()  # (tokens, F); a low-precision product would round the sums
            gram.add_(x.T @ x)
            total.add_(x.sum(0))
            count += len(x)
            heard[layer] = Heard(model.tensor("down", layer).to(context.device).float(), gram, total, count)

        return module.get_submodule(name).register_forward_pre_hook(hook)

    walk = Walk(model, context.tokens(model), context.device, context.dtype)
    walk.run([dense_variant(model.spec)], listener)
    return heard


def output_error(dense: Tensor, cut: Tensor, keep: Tensor, gram: Tensor) -> float:
    """||X Wᵀ - X_k W_kᵀ||² / ||X Wᵀ||² on the calibration inputs, from the Gram matrix alone."""
    gap = dense.clone()
    gap[:, keep] -= cut
    return float(((gap @ gram) * gap).sum() / ((dense @ gram) * dense).sum())


def channel_parameters(model: CausalLM, layer: int) -> int:
    """Parameters that one FFN channel of a layer costs."""
    spec = model.spec
    shape = spec.layers[layer]
    wider = shape.model_copy(update={"intermediate_size": shape.intermediate_size + 1})
    layers = (*spec.layers[:layer], wider, *spec.layers[layer + 1 :])
    return spec.model_copy(update={"layers": layers}).num_parameters - spec.num_parameters


def _aligned(width: float, multiple: int) -> int:
    """The largest multiple not above ``width``: at least what was asked for goes."""
    return int(width / multiple + 1e-9) * multiple
