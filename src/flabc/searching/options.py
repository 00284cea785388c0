"""How to search, and what of it cannot be done."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field

from flabc.compress.config import RestoreConfig, Target, WidthsConfig
from flabc.compress.search.latencies import Latencies
from flabc.errors import UnknownNameError, UsageError
from flabc.frozen import Frozen
from flabc.recipe import Recipe


class Options(Frozen):
    """How to search.

    ``sequences`` are the calibration windows that candidates are compared on: all on the first number of them, the
    survivors on the next; ``top_k`` restricts that to tokens that are somewhere in them among the dense model's so many
    likeliest; ``levels`` the sizes that each place can have; ``evaluate_on`` the corpora of held-out text, on which the
    best is compared over all tokens.
    The operator ``llm`` asks ``llm_model`` at ``llm_url``, or the model in ``llm_folder``, which is run here, or takes
    its replies from a transcript; when that fails for good, the search ends unless a ``fallback`` goes on. With
    ``latencies``, measured where the model will serve, the budget is time instead of parameters. ``ray`` is where so
    many ``workers`` measure candidates, ``local`` or a cluster's address.
    """

    operator: str = "evolution"
    evaluations: int = 400
    offspring: int = 16
    levels: int = 16
    sequences: tuple[int, ...] = (2, 8)
    top_k: int | None = Field(64, gt=0)
    sub_blocks: bool = False
    evaluate_on: tuple[str, ...] = ()
    llm_url: str | None = None
    llm_model: str | None = None
    llm_folder: str | None = None
    llm_replay: Path | None = None
    fallback: Literal["evolution"] | None = None
    latencies: Latencies | None = None
    ray: str | None = None
    workers: int = Field(2, gt=0)


@dataclass(frozen=True)
class Asked:
    """What a search was asked, all of it checked.

    Args:
        model: as the person named it.
        recipe: with the target that counts.
        at: which of its stages is searched.
        options: how.
        target: the fraction to keep, if the person gave one: of the parameters, or of a step's time.
        device: a torch device.
        seed: of the operator, and of the calibration text.
    """

    model: str
    recipe: Recipe
    at: int
    options: Options
    target: float | None
    device: str
    seed: int

    @property
    def stage(self) -> WidthsConfig:
        """The stage that is searched."""
        stage = self.recipe.stages[self.at]
        assert isinstance(stage, WidthsConfig)
        return stage

    @property
    def candidates(self) -> WidthsConfig:
        """How candidates are cut: refitted if the recipe refits them at all, be it by a restore stage that follows."""
        later = any(isinstance(each, RestoreConfig) for each in self.recipe.stages[self.at + 1 :])
        return self.stage.model_copy(update={"restore": self.stage.restore or later})


def asked(model: str, recipe: Recipe, options: Options, target: float | None, device: str, seed: int) -> Asked:
    """Check what a search is asked, before any work.

    Raises:
        UnknownNameError: for an unknown operator.
        UsageError: for anything else that cannot be done.
    """
    at = _widths_at(recipe)
    _check(options, recipe, target)
    if options.latencies is not None:
        recipe = recipe.model_copy(update={"target": None})  # the rates that are found say what goes
    elif target is not None:
        recipe = recipe.model_copy(update={"target": Target.model_validate({"params": target})})
    return Asked(model, recipe, at, options, target, device, seed)


def _widths_at(recipe: Recipe) -> int:
    """Which stage is searched.

    Raises:
        UsageError: if the recipe has none, or several.
    """
    found = [at for at, stage in enumerate(recipe.stages) if isinstance(stage, WidthsConfig)]
    if len(found) != 1:
        raise UsageError(
            f"A search finds the rates of one widths stage; the recipe {recipe.name} has {len(found)}.",
            fix="Give a recipe with one.",
        )
    return found[0]


def _check(options: Options, recipe: Recipe, target: float | None) -> None:
    """Refuse what cannot be done, before any work.

    Raises:
        UnknownNameError: for an unknown operator.
        UsageError: if the numbers of sequences do not rise, or are more than there are, or a budget of time has no
            target.
    """
    from flabc.compress.search.registry import OPERATORS

    if options.operator not in OPERATORS:
        raise UnknownNameError("operator", options.operator, OPERATORS)
    if options.latencies is not None and target is None:
        raise UsageError(
            "A table of latencies says what time is spent on, not how much may be.",
            fix="Give --target: the fraction of the dense model's step to keep.",
        )
    whom = [options.llm_replay, options.llm_folder, options.llm_url and options.llm_model]
    if options.operator == "llm" and len([each for each in whom if each is not None]) != 1:
        raise UsageError(
            "The operator llm has nobody to ask, or several.",
            fix="Give one of --llm-url with --llm-model, --llm-folder, or --llm-replay.",
        )
    rising = (0, *options.sequences)
    if any(before >= after for before, after in pairwise(rising)) or rising[-1] > recipe.calibration.sequences:
        raise UsageError(
            "The sequences to compare on do not fit.",
            expected=f"rising numbers up to calibration.sequences, {recipe.calibration.sequences}",
            found=", ".join(map(str, options.sequences)),
        )
