"""Result: what a function of the API gives back."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Result(BaseModel):
    """A frozen record; ``model_dump(mode="json")`` is what ``--json`` prints."""

    model_config = ConfigDict(frozen=True, extra="forbid")
