"""Restoration: after a cut, refit what is left to what was there, in closed form and without training.

``refit`` repairs one projection whose inputs were cut. The restore stage goes through the whole model, sub-block after
sub-block. The projections that a sub-block begins with are refitted to what they get from the cut layers below, and the
one that ends it is refitted so that the cut model's hidden states follow the dense model's. That also makes up for
layers that are gone, which no local refit can. Where a norm stands between a projection and the hidden states, as in
Gemma, it is what the dense projection gave that is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from flabc.console import progress
from flabc.families import Axis, Part

from . import bias
from .config import RestoreConfig
from .gram import DAMPING, damped
from .model import CausalLM, cut_vocab
from .ridge import FIRST, Fit, Ridge, parts
from .stage import Context, Plan, Stage
from .stored import Weight, loaded
from .walk import Decision, Walk, dense_variant


@dataclass(frozen=True)
class SubBlock:
    """A sub-block of a layer.

    Args:
        alone: what is left of the layer if there is nothing else.
        part: what its tensors belong to.
        norm: the role of the norm before it.
        output_norm: that of the norm behind its output projection, in families that have one.
    """

    alone: Decision
    part: Part
    norm: str
    output_norm: str


#: The sub-blocks of a layer in their order, by the role of the projection that ends them.
SUB_BLOCKS = {
    "o": SubBlock(Decision(ffn=False), Part.ATTENTION, "attention_norm", "attention_output_norm"),
    "down": SubBlock(Decision(attention=False), Part.FFN, "ffn_norm", "ffn_output_norm"),
}


@dataclass(frozen=True)
class RestorePlan(Plan):
    """The refitted projections, and biases of those that end a sub-block, by checkpoint name, in the model's dtype."""

    refitted: Mapping[str, Weight] = field(default_factory=dict)


def plan(model: CausalLM, config: RestoreConfig, context: Context) -> RestorePlan:
    """Refit every sub-block's projections to the dense model."""
    if not _narrower(model, context.dense):
        return RestorePlan("restore: no layer was cut; nothing to restore")
    tokens = context.tokens(model)
    firsts = context.firsts(model, tokens)
    walk = Walk(model, tokens, context.device, context.dtype, firsts=firsts)
    hidden, texts, fetched = walk.embed(), len(tokens), walk.fetched()
    fits = _Fits(model, config, context, texts, tokens.shape[1])
    before = after = 0.0
    with torch.no_grad(), progress("restoring layers", len(model.spec.layers)) as advance:
        for layer, aims in enumerate(dense_states(model, context, tokens, firsts)):
            weights = next(fetched)
            for role, aim in aims.items():
                if not _has(model, role, layer):
                    continue
                if config.inputs:
                    module = walk.layer(layer, SUB_BLOCKS[role].alone, weights)
                    norm = module.get_submodule(_inner(model, SUB_BLOCKS[role].norm, layer))
                    weights = fits.inputs(role, layer, weights, norm, aim.start, hidden.to(walk.dtype))
                block = _through(walk, layer, role, weights, hidden)
                before = _distance(block.hidden[:texts], aim.hidden[:texts])
                hidden = block.changed(fits.output(role, layer, block, aim))
                after = _distance(hidden[:texts], aim.hidden[:texts])
            del weights
            advance(1)
    details = {"refitted": len(fits.refitted), "last_layer_before": round(before, 6), "last_layer": round(after, 6)}
    summary = f"restore: {len(fits.refitted)} tensors refitted; last hidden states {after:.2%} from dense"
    return RestorePlan(summary, {**details, "dampings": fits.dampings}, fits.refitted)


def apply(model: CausalLM, plan: RestorePlan) -> CausalLM:
    """Put the refitted projections in place."""
    return replace(model, weights={**model.weights, **plan.refitted})


RESTORE: Stage[RestoreConfig, RestorePlan] = Stage(plan, apply)


@dataclass(frozen=True)
class Aim:
    """What the dense model has where a sub-block ends.

    Args:
        start: the hidden states that it receives, (N, T, D).
        hidden: the hidden states behind it, (N, T, D).
        output: what its output projection gives, (N * T, D), if a norm follows that.
    """

    start: Tensor
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
        for role in SUB_BLOCKS:
            if (projection := present.get(_inner(dense, role, layer))) is not None:
                heard = outputs[role] = []
                projection.register_forward_hook(lambda _, __, output, heard=heard: heard.append(output.flatten(0, 1)))
        return nullcontext()

    walk = Walk(dense, tokens, context.device, context.dtype, firsts=firsts)
    stream = walk.stream(dense_variant(dense.spec), listener if model.family.normed_outputs else None)
    ends = [*model.layer_origin[:-1], len(dense.spec.layers) - 1]
    for origin, end in zip(model.layer_origin, ends, strict=True):
        aims, own, middle = dict[str, Aim](), dict[str, Tensor](), torch.empty(0)
        for index, (before, between, after) in stream:
            if index == origin:
                own = {role: torch.cat(outputs.pop(role)) for role in list(outputs)}
                aims["o"], middle = Aim(before, between, own.get("o")), between
            if index == end:
                yield {**aims, "down": Aim(middle, after, own.get("down"))}
                break


class _Fits:
    """The refits of a model's projections, made one after another.

    Args:
        model: the cut model.
        config: the recipe's stage.
        context: where to compute, and where to keep what comes out.
        texts: N, how many texts are heard.
        length: T, tokens of each; what is heard behind the texts are first tokens.
    """

    def __init__(self, model: CausalLM, config: RestoreConfig, context: Context, texts: int, length: int) -> None:
        self.model, self.config, self.context, self.texts, self.length = model, config, context, texts, length
        self.refitted: dict[str, Weight] = {}
        self.dampings: dict[str, list[float | None]] = {}

    def inputs(
        self, role: str, layer: int, weights: Mapping[str, Tensor], norm: nn.Module, start: Tensor, hidden: Tensor
    ) -> dict[str, Tensor]:
        """Refit what receives the hidden states of a sub-block, behind its norm.

        All of these projections W see the same x̂ where the dense ones see x. So there is one change E for all, that
        with the least ||x - x̂ - E x̂||², and W + W E takes the place of W. It follows the layers below as they are now,
        as GPTAQ does when it rounds (Li et al., 2025).

        Args:
            role: of the projection that ends the sub-block.
            layer: its number.
            weights: the layer's.
            norm: the one before the sub-block.
            start: the dense model's hidden states there, (N, T, D).
            hidden: those of the cut model, (N, T, D).

        Returns:
            the layer's weights.
        """
        ridge = Ridge(hidden.shape[-1], hidden.shape[-1], hidden.device)
        wanted, found = start.to(hidden.dtype).flatten(0, 1), hidden.flatten(0, 1)
        for part, aside in self._parts(len(found)):
            received = norm(found[part])
            ridge.add(received, norm(wanted[part]).float() - received.float(), aside=aside)
        fit = self._fit(ridge, f"{role}_inputs")
        weights = dict(weights)
        for slot in self.model.family.layer_tensors if fit.changes else ():
            inner = self.model.inner_name(slot.role, layer)
            if slot.part is SUB_BLOCKS[role].part and slot.axes[1:] == (Axis.HIDDEN,) and inner in weights:
                name = self.model.name(slot.role, layer)
                dense = loaded(self.model.weights[name]).to(fit.change.device).float()
                changed = dense + dense @ fit.change
                weights[inner] = changed.to(weights[inner].dtype)
                self.refitted[name] = self.context.keep(changed, self.model)
        return weights

    def output(self, role: str, layer: int, block: _Block, aim: Aim) -> Tensor:
        """Refit the projection that ends a sub-block, and its bias: what they add to its output, (N * T, D).

        Errors count as shares of what is to be there, as the norm that comes next sees them; so the huge states of
        first tokens count no more than others.
        """
        shifted = bias.name_of(self.model, role, layer)
        gap, wanted = block.lacks(aim), (aim.hidden.flatten(0, 1) if aim.output is None else aim.output)
        ridge = Ridge(block.inputs.shape[1], gap.shape[1], gap.device, intercept=shifted is not None)
        for part, aside in self._parts(len(gap)):
            ridge.add(block.inputs[part], gap[part], _scale(wanted[part]), aside=aside)
        fit = self._fit(ridge, role)
        changes = {self.model.name(role, layer): fit.change} | ({shifted: fit.shift} if shifted else {})
        for name, by in changes.items() if fit.changes else ():
            self.refitted[name] = self.context.keep(loaded(self.model.weights[name]).float() + by.cpu(), self.model)
        return block.inputs @ fit.change.T.to(block.inputs.dtype) + fit.shift

    def _parts(self, tokens: int) -> Iterator[tuple[slice, bool]]:
        return parts(self.texts, self.length, tokens - self.texts * self.length)

    def _fit(self, ridge: Ridge, kind: str) -> Fit:
        chosen = self.dampings.setdefault(kind, [])
        last = next((each for each in reversed(chosen) if each is not None), FIRST)
        fit = ridge.fit(self.config.damping, FIRST if self.config.damping else last)
        chosen.append(fit.damping)
        return fit


def _scale(wanted: Tensor) -> Tensor:
    """The power of two next to what brings each token's states to a mean square of one, (tokens, D) to (tokens, 1)."""
    square = wanted.float().square().mean(1, keepdim=True)
    square = square.clamp(min=1e-4 * float(square.median()))  # next to nothing would count a thousandfold
    return torch.where(square > 0, (-0.5 * square.log2()).round().exp2(), 1.0)


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
    return spec.has_ffn if SUB_BLOCKS[role].alone.ffn else spec.has_attention


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
    model, normed = walk.model, walk.model.family.normed_outputs
    module = walk.layer(index, SUB_BLOCKS[role].alone, weights)
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
        norm = module.get_submodule(_inner(model, SUB_BLOCKS[role].output_norm, index))
        behind = _Behind(torch.cat(outputs), norm, start)
    return _Block(after, torch.cat(inputs), float(model.config[key]) if key else 1.0, behind)


def _inner(model: CausalLM, role: str, layer: int) -> str:
    """The module of a layer that has a tensor."""
    return model.inner_name(role, layer).removesuffix(".weight")


def _distance(hidden: Tensor, target: Tensor) -> float:
    """||h - t||² / ||t||², the mean over tokens."""
    wanted = target.float()
    return float(((hidden - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)).mean())
