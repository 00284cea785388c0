"""A whole population on one walk: what each genome's model says, against the dense model.

Every place is cut to every level of its site and refitted once, ahead, just as the widths stage would do it; a genome
is then a choice of levels, and genomes that agree on their first layers share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from flabc.errors import CorpusError

from .. import bias
from ..allocate import Pool
from ..config import WidthsConfig
from ..criteria import kl
from ..data.corpus import Document
from ..model import CausalLM
from ..sensitivity import Levels, levels_of, narrower
from ..stage import Context
from ..units import KINDS
from ..walk import Decision, Variant, Walk, dense_variant
from .genome import Genome, Place, Space
from .grid import pool_of


@dataclass(frozen=True)
class Population:
    """A model whose places have been cut to every level of a space.

    Args:
        dense: what candidates are compared with; of the same vocabulary.
        model: as the widths stage finds it, with the biases that the stage switches on.
        space: what can be asked for.
        levels: what each place becomes at each level but the highest, and absence.
        worth: of each unit of each place, by which the units go.
        context: where to compute.
    """

    dense: CausalLM
    model: CausalLM
    space: Space
    levels: Levels
    worth: Mapping[Place, Tensor]
    context: Context

    @property
    def pools(self) -> list[Pool]:
        """The sites as the allocations see them."""
        sites = self.space.sites
        return [replace(pool_of(self.model, site), worth=self.worth[site.place]) for site in sites]

    def parameters(self, genome: Genome) -> int:
        """Of the whole model that a genome leaves."""
        space = self.space
        return self.model.spec.num_parameters - space.parameters(space.tops) + space.parameters(space.levels(genome))

    def decision(self, genome: Genome, layer: int) -> Decision:
        """What a genome leaves of a layer."""
        left = {kind: genome.units((kind, layer)) for kind in ("ffn", "heads")}
        whole = self.space.whole
        narrowed = ((kind, units) for kind, units in left.items() if 0 < units < whole.units((kind, layer)))
        return Decision(attention=left["heads"] > 0, ffn=left["ffn"] > 0, narrowed=tuple(narrowed))

    def variant(self, genome: Genome) -> Variant:
        """A genome as the walk takes it."""
        return tuple(self.decision(genome, layer) for layer in range(len(self.model.spec.layers)))

    def on(self, tokens: Tensor, top_k: int | None = None) -> Measured:
        """The same, to be compared on these tokens, (N, T), over the likely tokens or over all."""
        context = self.context
        walk = Walk(self.model, tokens, context.device, context.dtype, narrower(self.levels))
        return Measured(self, walk, top_k)


@dataclass(frozen=True)
class Measured:
    """A population and the tokens that it is compared on.

    Args:
        population: it.
        walk: over the tokens.
        top_k: distributions are compared among the tokens that are somewhere in the text one of the dense model's so
            many likeliest, and those of the text. Reading out a large vocabulary may take as long as the layers.
    """

    population: Population
    walk: Walk
    top_k: int | None = None

    @cached_property
    def _dense(self) -> Tensor:
        """The hidden states of the dense model, (N, T, D)."""
        model = self.population.dense
        dense = dense_variant(model.spec)
        return replace(self.walk, model=model, narrow=None).run([dense])[dense]

    @cached_property
    def _read(self) -> Walk:
        """The walk that reads out what is compared."""
        vocabulary = self.population.model.spec.vocab_size
        if self.top_k is None or self.top_k >= vocabulary:
            return self.walk
        likely = torch.zeros(vocabulary, dtype=torch.bool, device=self.walk.device)
        likely[self.walk.tokens.flatten()] = True
        dense = dense_variant(self.population.model.spec)
        for said in self.walk.readouts({dense: self._dense}):
            likely[said[dense].log_probs.topk(self.top_k).indices.flatten()] = True
        return replace(self.walk, rows=likely.nonzero().flatten().cpu())

    @property
    def tokens_compared(self) -> int:
        """Tokens of the vocabulary that distributions are compared over."""
        rows = self._read.rows
        return self.population.model.spec.vocab_size if rows is None else len(rows)

    @property
    def weight(self) -> int:
        """Tokens that are compared."""
        return self.walk.tokens[:, 1:].numel()

    def kl(self, genomes: Iterable[Genome]) -> dict[Genome, float]:
        """KL(dense || genome) over the token logits, in nats per token, of all genomes in one walk."""
        variants = {genome: self.population.variant(genome) for genome in genomes}
        costs = self._read.costs(self._dense, self.walk.run(variants.values()), kl) if variants else {}
        return {genome: costs[variant] for genome, variant in variants.items()}


def with_biases(model: CausalLM, config: WidthsConfig) -> CausalLM:
    """The model with the biases that the widths stage would switch on."""
    roles = [KINDS[name].role for name in config.of]
    return bias.switched_on(model, bias.addable(model, roles) if config.bias == "add" else ())


def population_of(dense: CausalLM, model: CausalLM, space: Space, config: WidthsConfig, context: Context) -> Population:
    """Cut every place to every level.

    Args:
        dense: what candidates are to be compared with.
        model: as the widths stage finds it, ``with_biases``.
        space: the levels.
        config: the stage, whose score, refit and biases count.
        context: the calibration text.
    """
    sizes = {site.place: [size for size in site.sizes[:-1] if size] for site in space.sites}
    worth = dict[Place, Tensor]()
    levels = levels_of(
        model,
        config,
        context,
        context.tokens(model),
        worth,
        lambda place, _: sizes[place],
        restore=config.restore,
        bias=config.bias != "none",
    )
    return Population(dense, model, space, levels, worth, context)


def check_apart(searched: Sequence[Document], evaluated: Sequence[Document]) -> None:
    """What a search has seen cannot tell how good its result is: texts are compared by their sha256.

    Raises:
        CorpusError: if a text is on both sides; the first is named.
    """
    seen = {document.digest for document in searched}
    both = [document.name for document in evaluated if document.digest in seen]
    if both:
        raise CorpusError(
            "The text to evaluate on is text that was searched on.",
            expected="no text on both sides",
            found=f"{len(both)}, the first {both[0]}",
            fix="Evaluate on another corpus.",
        )
