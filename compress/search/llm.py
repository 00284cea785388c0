"""The operator ``llm``: a language model runs the whole evolution. Self-Pruner (Huang et al., 2025).

It makes the first population, and in every generation selects, crosses and mutates. Its answers are JSON; those that
do not validate are asked for again, so many times and no more. What it says of rates is repaired like anything else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flabc.console import note
from flabc.errors import LanguageModelError
from flabc.frozen import problems

from .fitness import Score
from .genome import Genome, Site
from .journal import Journal, Reply
from .operators import Candidate, Proposals, Task, evolution

#: Times that one answer is asked for again when it does not validate.
RETRIES = 3

#: Characters of an answer that cannot be used which are repeated when it is asked for again: they cost room.
REPEATED = 1000

#: Genomes of the past that the model is shown, the best ones.
SHOWN = 10

Message = Mapping[str, str]


#: From the messages of a conversation to the reply; raises ``LanguageModelError`` when there is none.
Client = Callable[[Sequence[Message]], Reply]


class Rates(BaseModel):
    """One genome as the model writes it: the share that each layer loses, by kind."""

    model_config = ConfigDict(extra="ignore")

    how: str = Field("llm", max_length=40)
    ffn: list[float] | None = None
    heads: list[float] | None = None


class Answer(BaseModel):
    """What the model is asked for."""

    model_config = ConfigDict(extra="ignore")

    candidates: list[Rates] = Field(min_length=1)


@dataclass
class Dialogue:
    """Everything that is asked and said, through the journal: what is in there is not asked again.

    Args:
        client: who answers.
        journal: keeps the replies.
        fallback: whether ``evolution`` goes on when the model fails for good; it has failed then, for every resume.
    """

    client: Client
    journal: Journal
    fallback: bool = False
    asked: int = 0
    valid: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def ask(self, messages: Sequence[Message]) -> str:
        """The next reply.

        Raises:
            LanguageModelError: if there is none.
        """
        reply = self.journal.replies.get(self.asked) or self._new(messages)
        self.asked += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        return reply.text

    def _new(self, messages: Sequence[Message]) -> Reply:
        if self.journal.gave_up:
            raise LanguageModelError("The language model failed when this search was begun.")
        reply = self.client(messages)
        self.journal.hear(self.asked, reply)
        return reply


def llm(task: Task) -> Proposals:
    """A language model proposes; with a fallback, ``evolution`` goes on from the best when it fails for good.

    Raises:
        LanguageModelError: if it fails for good and there is no fallback.
    """
    assert task.dialogue is not None, "the operator llm has a dialogue"
    seen = dict[Genome, str]()
    scores: Mapping[Genome, Score] = {}
    try:
        while True:
            population = _proposed(task, task.dialogue, seen, scores)
            seen |= {candidate.genome: candidate.origin for candidate in population}
            scores = yield population
    except LanguageModelError as error:
        if not task.dialogue.fallback:
            raise
        task.dialogue.journal.give_up()
        note(f"The search goes on with evolution: {error}")
    best = min(scores, key=lambda genome: (scores[genome], genome)) if scores else None
    yield from evolution(task.beginning_at(best))


def _proposed(
    task: Task, dialogue: Dialogue, seen: Mapping[Genome, str], scores: Mapping[Genome, Score]
) -> list[Candidate]:
    """Genomes that are new, from one valid answer.

    Raises:
        LanguageModelError: if no answer is valid.
    """
    messages: list[Message] = [{"role": "user", "content": _prompt(task, scores)}]
    for _ in range(1 + RETRIES):
        text = dialogue.ask(messages)
        try:
            found = _candidates(task, text, seen)
        except ValueError as error:
            again = _render("again.j2", problem=str(error)[:1000])
            messages += [{"role": "assistant", "content": text[:REPEATED]}, {"role": "user", "content": again}]
            continue
        dialogue.valid += 1
        return found
    raise LanguageModelError(
        f"The language model gave {1 + RETRIES} answers in a row that cannot be used.",
        found=f"at last {text[:200]!r}",
        fix="Use a stronger model, or --fallback evolution.",
    )


def _prompt(task: Task, scores: Mapping[Genome, Score]) -> str:
    space = task.space
    kinds = list(dict.fromkeys(site.place[0] for site in space.sites))
    best = sorted(scores, key=lambda genome: (scores[genome], genome))[:SHOWN]
    past = [{"kl": f"{scores[genome].kl:.4g}", "rates": _shares(task, genome, kinds)} for genome in best]
    return _render(
        "evolve.j2" if past else "initialise.j2",
        layers=len(space.whole.ffn),
        kinds=kinds,
        share=f"{1 - space.budget / space.most:.3f}",
        unit=space.unit,
        count=task.offspring,
        past=past,
    )


def _shares(task: Task, genome: Genome, kinds: Sequence[str]) -> str:
    """A genome as the model is to write it."""
    from .grid import rates_of

    rates = rates_of(task.space.whole, genome, kinds)
    return json.dumps({kind: [round(rate, 3) for rate in shares] for kind, shares in rates.items()})


def _render(name: str, **values: Any) -> str:
    text = (files(__package__) / "prompts" / name).read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(text).render(values)


def _candidates(task: Task, text: str, seen: Mapping[Genome, str]) -> list[Candidate]:
    """The new genomes of an answer.

    Raises:
        ValueError: saying what is wrong with it.
    """
    begin, end = text.find("{"), text.rfind("}")
    if begin < 0 or end < begin:
        raise ValueError("There is no JSON object in the answer.")
    try:
        answer = Answer.model_validate_json(text[begin : end + 1])
    except ValidationError as error:
        raise ValueError(problems(error)) from error
    found = [_candidate(task, rates) for rates in answer.candidates]
    new = {candidate.genome: candidate for candidate in reversed(found) if candidate.genome not in seen}
    if not new:
        raise ValueError("All of these candidates were tried before.")
    return list(new.values())[::-1]


def _candidate(task: Task, rates: Rates) -> Candidate:
    space = task.space
    layers = len(space.whole.ffn)
    for kind in dict.fromkeys(site.place[0] for site in space.sites):
        shares = getattr(rates, kind)
        if shares is None or len(shares) != layers or not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"{kind!r} must have {layers} numbers from 0 to 1.")
    levels = [_level(site, getattr(rates, site.place[0])[site.place[1]]) for site in space.sites]
    return Candidate(space.decode(levels, task.turns), rates.how)


def _level(site: Site, rate: float) -> int:
    """The level nearest to a rate."""
    wanted = site.sizes[-1] * (1 - rate)
    return min(range(len(site.sizes)), key=lambda level: abs(site.sizes[level] - wanted))
