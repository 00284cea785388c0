"""Restoration: after a cut, refit what is left to what was there, in closed form and without training.

``refit`` repairs one projection whose inputs were cut. The restore stage goes through the whole model: sub-block after
sub-block, each output projection is refitted so that the cut model's hidden states, as they are after all the cuts
below, follow the dense model's. It also makes up for layers that are gone, which no local refit can. Where a norm
stands between a projection and the hidden states, as in Gemma, it is what the dense projection gave that is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flabc.console import progress

from . import bias
from .config import RestoreConfig
from .gram import DAMPING, Gram, damped, pieces
from .model import CausalLM, cut_vocab
from .stage import Context, Plan, Stage
from .stored import Weight, loaded
from .walk import Decision, Walk, dense_variant

#: The projections that end sub-blocks, in their order, and what a layer is up to there from the one before.
OUTPUTS = {"o": Decision(ffn=False), "down": Decision(attention=False)}

#: The norms behind them, in families that have any.
OUTPUT_NORMS = {"o": "attention_output_norm", "down": "ffn_output_norm"}


@dataclass(frozen=True)
class RestorePlan(Plan):
    """The refitted output projections, (D, F), and their biases, (D,), by checkpoint name, in the model's dtype."""

    refitted: Mapping[str, Weight] = field(default_factory=dict)


def plan(model: CausalLM, config: RestoreConfig, context: Context) -> RestorePlan:
    """Refit every sub-block's output projection to the dense model."""
    if not _narrower(model, context.dense):
        return RestorePlan("restore: no layer was cut; nothing to restore")
    tokens = context.tokens(model)
    firsts = context.firsts(model, tokens)
    walk = Walk(model, tokens, context.device, context.dtype, firsts=firsts)
    hidden, texts, fetched = walk.embed(), len(tokens), walk.fetched()
    refitted, count, before, after = dict[str, Weight](), 0, 0.0, 0.0
    with torch.no_grad(), progress("restoring layers", len(model.spec.layers)) as advance:
        for layer, aims in enumerate(dense_states(model, context, tokens, firsts)):
            weights = next(fetched)
            for role, aim in aims.items():
                if not _has(model, role, layer):
                    continue
                block = _through(walk, layer, role, weights, hidden)
                before = _distance(block.hidden[:texts], aim.hidden[:texts])
                changes, step = _refit(model, role, layer, block.lacks(aim), block.inputs, config.damping)
                for name, by in changes.items():
                    refitted[name] = context.keep(loaded(model.weights[name]).float() + by.cpu(), model)
                hidden = block.changed(step)
                after = _distance(hidden[:texts], aim.hidden[:texts])
                count += 1
            del weights
            advance(1)
    details = {"refitted": count, "last_layer_before": round(before, 6), "last_layer": round(after, 6)}
    summary = f"restore: {count} output projections refitted; last hidden states {after:.2%} from dense"
    return RestorePlan(summary, details, refitted)


def apply(model: CausalLM, plan: RestorePlan) -> CausalLM:
    """Put the refitted projections in place."""
    return replace(model, weights={**model.weights, **plan.refitted})


RESTORE: Stage[RestoreConfig, RestorePlan] = Stage(plan, apply)


@dataclass(frozen=True)
class Aim:
    """What the dense model has where a sub-block ends.

    Args:
        hidden: the hidden states behind it, (N, T, D).
        output: what its output projection gives, (N * T, D), if a norm follows that.
    """

    hidden: Tensor
    output: Tensor | None = None


def dense_states(model: CausalLM, context: Context, tokens: Tensor, firsts: Tensor | None) -> Iterator[dict[str, Aim]]:
    """What the dense model has where each sub-block of the cut model ends, computed as it is needed.

    A layer stands for itself and for those removed between it and the one before it; what was removed behind the
    last layer is its FFN's to make up for. Behind a norm a projection stands for itself alone.

    Args:
        model: the cut model.
        context: has the dense model.
        tokens: in the cut model's ids, (N, T).
        firsts: those that stand alone, (M, T).

    Yields:
        for each layer, what to follow behind the attention (``o``) and behind the FFN (``down``).
    """
    dense, outputs = cut_vocab(context.dense, model.token_origin), dict[str, list[Tensor]]()

    def listener(layer: int, module: nn.Module) -> AbstractContextManager[None]:
        present = dict(module.named_modules())
        for role in OUTPUTS:
            if (projection := present.get(_inner(dense, role, layer))) is not None:
                heard = outputs[role] = []
                projection.register_forward_hook(lambda _, __, output, heard=heard: heard.append(output.flatten(0, 1)))
        return nullcontext()

    walk = Walk(dense, tokens, context.device, context.dtype, firsts=firsts)
    stream = walk.stream(dense_variant(dense.spec), listener if model.family.normed_outputs else None)
    ends = [*model.layer_origin[:-1], len(dense.spec.layers) - 1]
    for origin, end in zip(model.layer_origin, ends, strict=True):
        aims, own = dict[str, Aim](), dict[str, Tensor]()
        for index, (_, between, after) in stream:
            if index == origin:
                own = {role: torch.cat(outputs.pop(role)) for role in list(outputs)}
                aims["o"] = Aim(between, own.get("o"))
            if index == end:
                yield {**aims, "down": Aim(after, own.get("down"))}
                break


def _refit(
    model: CausalLM, role: str, layer: int, gap: Tensor, inputs: Tensor, damping: float
) -> tuple[dict[str, Tensor], Tensor]:
    """The changes of a projection and its bias, by checkpoint name, and what they add to its output, (N * T, D)."""
    shifted = bias.name_of(model, role, layer)
    change, shift = explain(gap, inputs, damping, intercept=shifted is not None)
    changes = {model.name(role, layer): change} | ({shifted: shift} if shifted else {})
    return changes, inputs @ change.T.to(inputs.dtype) + shift


def explain(gap: Tensor, inputs: Tensor, damping: float, *, intercept: bool = False) -> tuple[Tensor, Tensor]:
    """The change of a projection, and of its bias, that makes up best for a gap in its output.

    Minimises ||gap - X Δᵀ - δ||² + λ ||Δ||² over Δ, and over δ if there is a bias.

    Args:
        gap: what the output lacks, (tokens, D).
        inputs: what the projection receives, X, (tokens, F).
        damping: λ as a share of the mean diagonal of XᵀX.
        intercept: whether there is a bias.

    Returns:
        Δ, (D, F), and δ, (D,), nought without a bias; float32.
    """
    gram = Gram(inputs.shape[1], inputs.device)
    gram.add(inputs)
    right = torch.zeros(inputs.shape[1], gap.shape[1], device=inputs.device)
    for part, lacking in zip(pieces(inputs), pieces(gap), strict=True):
        right.addmm_(part.T, lacking)
    left = gram.matrix()
    if not intercept:
        return _solve(left.double(), right.double(), damping).T.float(), gap.new_zeros(gap.shape[1])
    mean, lacks = inputs.mean(0, dtype=torch.float32), gap.mean(0)
    left.addr_(mean, mean, alpha=-len(gap))
    right.addr_(mean, lacks, alpha=-len(gap))
    change = _solve(left.double(), right.double(), damping).T.float()
    return change, (lacks.double() - change.double() @ mean.double()).float()  # see units.cut_projection


def refit(weight: Tensor, gram: Tensor, keep: Tensor, damping: float = DAMPING) -> Tensor:
    """The projection from the kept inputs that comes nearest to the dense output on the calibration inputs.

    Minimises ||X Wᵀ - X_k W_kᵀ||² + λ ||W_k - W[:, k]||² over W_k, which the Gram matrix G = XᵀX gives in closed
    form. Damped towards the weights that were there, not to zero.

    Args:
        weight: the dense projection W, (D, F).
        gram: G, (F, F).
        keep: indices k of the inputs that stay.
        damping: λ as a share of the mean diagonal of G[k, k].

    Returns:
        W_k, (D, len(keep)), float32.
    """
    gram, weight = gram.double(), weight.double()
    gone = torch.ones(len(gram), dtype=torch.bool, device=gram.device)
    gone[keep] = False
    # What the removed inputs gave is the gap that the kept ones have to explain.
    change = _solve(gram[keep][:, keep], gram[keep][:, gone] @ weight[:, gone].T, damping)  # (K, D)
    return (weight[:, keep] + change.T).float()


def _solve(gram: Tensor, right: Tensor, damping: float) -> Tensor:
    """(G + λI)⁻¹ R; G symmetric, float64."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped(gram, damping)))


def _narrower(model: CausalLM, dense: CausalLM) -> bool:
    """Whether anything inside the layers is gone."""
    return model.spec.layers != dense.spec.layers


def _has(model: CausalLM, role: str, layer: int) -> bool:
    """Whether a layer has the sub-block that a projection ends."""
    spec = model.spec.layers[layer]
    return spec.has_ffn if OUTPUTS[role].ffn else spec.has_attention


@dataclass(frozen=True)
class _Block:
    """A sub-block of the cut model that calibration went through.

    Args:
        hidden: the hidden states behind it, (N, T, D), float32.
        inputs: what its output projection received, (N * T, F).
        multiplier: what the projection's output is multiplied with before it is added to the hidden states.
        behind: if a norm follows the projection: what there is behind it.
    """

    hidden: Tensor
    inputs: Tensor
    multiplier: float
    behind: _Behind | None

    def lacks(self, aim: Aim) -> Tensor:
        """What the projection's output lacks, (N * T, D), float32."""
        if self.behind is None:
            return (aim.hidden.float() - self.hidden).flatten(0, 1) / self.multiplier
        assert aim.output is not None, "behind a norm the dense projection is heard"
        return aim.output.float() - self.behind.output.float()

    def changed(self, step: Tensor) -> Tensor:
        """The hidden states behind it once the projection gives so much more, (N * T, D); (N, T, D), float32.

        In place where nothing follows the projection: of a large model they are a sizeable part of what is in memory.
        """
        if self.behind is None:
            return self.hidden.add_((self.multiplier * step).view_as(self.hidden))
        return self.behind.changed(step)


@dataclass(frozen=True)
class _Behind:
    """A projection's output, (N * T, D), the norm that follows it, and the hidden states that gets added to."""

    output: Tensor
    norm: nn.Module
    start: Tensor

    def changed(self, step: Tensor) -> Tensor:
        """See ``_Block``."""
        added = self.norm((self.output + step).to(self.output.dtype))
        hidden: Tensor = self.start.float() + added.float().view_as(self.start)
        return hidden


def _through(walk: Walk, index: int, role: str, weights: Mapping[str, Tensor], hidden: Tensor) -> _Block:
    """Send hidden states, (N, T, D), through a sub-block of the cut model."""
    module, model, normed = walk.layer(index, OUTPUTS[role], weights), walk.model, walk.model.family.normed_outputs
    inputs, outputs = list[Tensor](), list[Tensor]()

    def hear(_: nn.Module, given: tuple[Tensor, ...], gave: Tensor) -> None:
        inputs.append(given[0].flatten(0, 1))
        if normed:
            outputs.append(gave.flatten(0, 1))

    module.get_submodule(_inner(model, role, index)).register_forward_hook(hear)
    start = hidden.to(walk.dtype)
    after = walk.forward(module, index, start).float()
    key = model.family.output_multiplier
    behind = None
    if normed:
        norm = module.get_submodule(_inner(model, OUTPUT_NORMS[role], index))
        behind = _Behind(torch.cat(outputs), norm, start)
    return _Block(after, torch.cat(inputs), float(model.config[key]) if key else 1.0, behind)


def _inner(model: CausalLM, role: str, layer: int) -> str:
    """The module of a layer that has a tensor."""
    return model.inner_name(role, layer).removesuffix(".weight")


def _distance(hidden: Tensor, target: Tensor) -> float:
    """||h - t||² / ||t||²."""
    wanted = target.float()
    return float((hidden - wanted).square().sum() / wanted.square().sum())
