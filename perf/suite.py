"""Suites: what is measured of engines for a purpose, as a file with a name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from flabc.errors import UnknownNameError
from flabc.frozen import Frozen, read_yaml, validated

SHIPPED = Path(__file__).parent / "suites"

Count = Annotated[int, Field(ge=1)]
Counts = Annotated[tuple[Count, ...], Field(min_length=1)]
Rates = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...]


class Suite(Frozen):
    """Options of ``flabc bench``; what is None is left to the command.

    Args:
        description: for whom it is, in a sentence.
        prompt_tokens: lengths of prompts; every one is measured with every batch.
        batch: sequences at once.
        output_tokens: that each run produces.
        rounds: of dense, pruned, pruned, dense in each opening.
        openings: how often both engines are opened.
        concurrency: loads of so many clients that never pause.
        arrival_rate: loads of so many requests per second.
        requests: that a run under load counts.
        max_batch: sequences that run at once under load.
    """

    description: str = ""
    prompt_tokens: Counts | None = None
    batch: Counts | None = None
    output_tokens: int | None = Field(None, ge=2)
    rounds: Count | None = None
    openings: Count | None = None
    concurrency: Counts | None = None
    arrival_rate: Rates | None = None
    requests: int | None = Field(None, ge=2)
    max_batch: Count | None = None

    def options(self) -> dict[str, object]:
        """What it says, by the options' names."""
        return self.model_dump(exclude_none=True, exclude={"description"})


def shipped() -> dict[str, Path]:
    """The shipped suites by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def load(name: str) -> Suite:
    """Load a shipped suite by name, or a file.

    Raises:
        UnknownNameError: if it is neither.
        RecipeError: if it does not validate; every wrong field is named.
    """
    file = shipped().get(name, Path(name))
    if not file.is_file():
        raise UnknownNameError("suite", name, shipped())
    return validated(Suite, read_yaml(file), f"The suite {name}")
