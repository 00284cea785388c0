"""What can be narrowed, and what is known of it: the units of each layer, and what the projection they feed receives.

The calibration tokens go through the present model once; each projection adds up what it is given.

Letters in shape comments: D hidden_size, F inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flabc.spec import LayerSpec

from . import bias as biases
from .gram import Gram
from .model import CausalLM, cut_channels, cut_heads
from .restore import refit
from .score import Heard
from .stage import Context
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


def places(model: CausalLM, kinds: Sequence[str]) -> list[Place]:
    """Every layer that has units of these kinds."""
    return [(name, at) for name in kinds for at, layer in enumerate(model.spec.layers) if KINDS[name].units(layer)]


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


def listen(
    model: CausalLM,
    kinds: Sequence[str],
    tokens: Tensor,
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
        tokens: what is sent, (N, T).
        context: where to compute, and in which precision.
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

    walk = Walk(model, tokens, context.device, context.dtype, firsts=context.firsts(model, tokens))
    walk.run([dense_variant(model.spec)], listener)


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


@dataclass(frozen=True)
class Cut:
    """What becomes of a place that loses units.

    Args:
        keep: the units that stay, ascending.
        refitted: what takes the place of the output projection, (D, F), and of its bias, (D,), by checkpoint name.
        error: the output's error relative to its square, if the Gram matrix was heard.
    """

    keep: tuple[int, ...]
    refitted: Mapping[str, Weight]
    error: float | None

    def kept(self, keep: Callable[[Tensor], Weight]) -> Cut:
        """The same with its tensors put away."""
        return replace(self, refitted={name: keep(loaded(tensor)) for name, tensor in self.refitted.items()})


def cut_place(
    model: CausalLM, place: Place, heard: Heard, worth: Tensor, left: int, *, restore: bool, bias: bool
) -> Cut:
    """Keep the units of a place that are worth most.

    Args:
        model: the model.
        place: where.
        heard: what its projection received; with a bias, the Gram matrix is centred in place.
        worth: of each unit, (U,).
        left: how many stay.
        restore: refit the projection, for which the Gram matrix must have been heard.
        bias: make up for the mean by the projection's bias, if it has one.
    """
    kept = worth.topk(left).indices.sort().values
    inputs = (kept[:, None] * heard.unit + torch.arange(heard.unit, device=kept.device)).flatten()
    role, layer = KINDS[place[0]].role, place[1]
    shifted = biases.name_of(model, role, layer) if bias else None
    cut = cut_projection(heard, inputs, restore=restore, bias=shifted is not None)
    refitted = {model.name(role, layer): cut.weight} if restore else {}
    if shifted is not None:
        refitted[shifted] = cut.shift.cpu() + loaded(model.weights[shifted]).float()
    return Cut(tuple(kept.tolist()), refitted, cut.error)


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
    # In float64: a product with one vector rounds by where in memory it lies, and streamed weights lie elsewhere.
    mean = heard.total.double() / heard.tokens
    shift = heard.weight.double() @ mean - weight.double() @ mean[keep]
    error = None
    if gram is not None:
        gap = heard.weight.clone()
        gap[:, keep] -= weight
        error = energy(gap, gram) / whole if whole else 0.0
    return CutProjection(weight, shift.float(), error)


def energy(weight: Tensor, gram: Tensor) -> float:
    """||X Wᵀ||² from the Gram matrix of X alone."""
    return float(((weight @ gram) * weight).sum())
