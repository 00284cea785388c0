"""A population on one walk, against models that the widths stage really cut, each run by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flabc.compress import load, widths
from flabc.compress.config import WidthsConfig
from flabc.compress.data.corpus import Document
from flabc.compress.model import CausalLM
from flabc.compress.search.genome import Genome
from flabc.compress.search.grid import rates_of, space_of
from flabc.compress.search.population import Population, check_apart, population_of, with_biases
from flabc.compress.stage import Context
from flabc.compress.walk import Walk, dense_variant, steps_of
from flabc.errors import CorpusError

MakeContext = Callable[..., Context]


def made(model: CausalLM, context: Context, **fields: Any) -> tuple[Population, WidthsConfig]:
    config = WidthsConfig.model_validate({"of": ("ffn", "heads"), "multiple_of": 8, **fields})
    start = with_biases(model, config)
    space = space_of(start, config, round(0.8 * start.spec.num_parameters), 5, sub_blocks=True)
    return population_of(model, start, space, config, context), config


def some(population: Population, count: int) -> list[Genome]:
    rng, space = np.random.default_rng(1), population.space
    drawn = [space.decode([int(rng.integers(0, top + 1)) for top in space.tops]) for _ in range(count - 1)]
    without_first_ffn = space.decode([0, *(top - 1 for top in space.tops[1:])], range(len(space.sites))[::-1])
    return [decoded.genome for decoded in (*drawn, without_first_ffn)]


def log_probs(model: CausalLM, tokens: Tensor) -> Tensor:
    walk, variant = Walk(model, tokens, torch.device("cpu"), torch.float32), dense_variant(model.spec)
    return torch.cat([group[variant].log_probs for group in walk.readouts(walk.run([variant]))])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen2-tied", {}),
        ("llama-untied-biased", {"score": "wifv"}),
        ("llama-tied", {"bias": "add", "score": "wanda"}),
        ("phi3-untied", {"restore": False, "score": "activation"}),
    ],
)
def test_costs_are_those_of_candidates_that_were_really_cut(
    tiny: Callable[[str], Path], make_context: MakeContext, name: str, fields: dict[str, Any]
) -> None:
    model = load.load(str(tiny(name)))
    context = make_context(model)
    population, config = made(model, context, **fields)
    genomes = some(population, 4)
    assert genomes[-1].ffn[0] == 0
    tokens = context.tokens(model)[2:5]
    found = population.on(tokens).kl(genomes)
    dense = log_probs(model, tokens)
    for genome in genomes:
        rates = rates_of(population.space.whole, genome, config.of)
        stage = WidthsConfig.model_validate({**config.model_dump(), "rates": rates})
        said = log_probs(widths.apply(model, widths.plan(model, stage, context)), tokens)
        brute = float((dense.exp() * (dense - said)).sum(-1).mean())
        assert brute > 1e-3
        assert found[genome] == pytest.approx(brute, rel=1e-3)


def test_costs_may_be_among_the_likely_tokens_alone(tied: CausalLM, make_context: MakeContext) -> None:
    """The tokens and what is normalised over them are taken here by hand, from torch."""
    context = make_context(tied)
    population, config = made(tied, context)
    tokens, genome = context.tokens(tied)[2:5], some(population, 2)[0]
    stage = WidthsConfig.model_validate(
        {**config.model_dump(), "rates": rates_of(population.space.whole, genome, config.of)}
    )
    dense, said = (log_probs(model, tokens) for model in (tied, widths.apply(tied, widths.plan(tied, stage, context))))
    likely = sorted({*tokens.flatten().tolist(), *dense.argsort(descending=True)[:, :3].flatten().tolist()})
    assert len(likely) < tied.spec.vocab_size / 2
    theirs, ours = (each[:, likely].log_softmax(-1) for each in (dense, said))
    expected = float(functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean())
    assert population.on(tokens, top_k=3).kl([genome])[genome] == pytest.approx(expected, rel=1e-3)
    measured = population.on(tokens)
    assert population.on(tokens, top_k=tied.spec.vocab_size).kl([genome]) == measured.kl([genome])


def test_what_a_genome_costs_does_not_depend_on_who_rides_along(tied: CausalLM, make_context: MakeContext) -> None:
    """Or a search that was cut off could not come to the same end."""
    context = make_context(tied)
    population, _ = made(tied, context)
    genomes = some(population, 6)
    measured = population.on(context.tokens(tied)[:2])
    together = measured.kl(genomes)
    assert together == {genome: measured.kl([genome])[genome] for genome in reversed(genomes)}


def test_genomes_share_the_layers_on_which_they_agree(tied: CausalLM, make_context: MakeContext) -> None:
    population, _ = made(tied, make_context(tied))
    whole = population.space.whole
    last = [whole.with_units({("ffn", 2): units}) for units in (16, 32, 48)]
    assert steps_of([population.variant(genome) for genome in last]) == [1, 1, 3]


def test_text_that_was_searched_on_is_refused() -> None:
    texts = [Document(name, name * 9) for name in "abcd"]
    check_apart(texts[:2], texts[2:])
    with pytest.raises(CorpusError, match="Found: 1, the first other"):
        check_apart(texts, [replace(texts[1], name="other"), Document("e", "e")])
