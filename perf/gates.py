"""Gates: what a change may cost, as a file that is committed beside the code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from flabc.errors import UnknownNameError
from flabc.frozen import Frozen, read_yaml, validated
from flabc.runtime.evaluate.task import KL, PERPLEXITY, TASKS, parse
from flabc.runtime.measure.result import Sample, Workload

#: Times of a run, all of which should be low, in milliseconds.
SPEEDS: dict[str, Callable[[Sample], float]] = {
    "ttft_ms": lambda sample: sample.ttft_ms,
    "tpot_ms": lambda sample: sample.tpot_ms,
    "total_ms": lambda sample: sample.total_ms,
}

#: What is counted, not timed.
SIZES = ("parameters", "bytes_on_disk", "peak_memory_mib")


def _each_known(kind: str, known: Any) -> AfterValidator:
    def check(given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in known:
                raise ValueError(str(UnknownNameError(kind, name, known)))
        return given

    return AfterValidator(check)


#: The share by which something may rise; below nought, by which it must have fallen.
Rise = Annotated[float, Field(gt=-1)]


class QualityGate(Frozen):
    """A task of ``flabc eval`` and what its first figure may be.

    Args:
        max_worse: how much worse than the baseline's it may be, in the figure's own unit (nats, bits, share).
        max_value: what it may not be above, whatever the baseline; for figures of which less is better.
        min_value: what it may not be below, likewise; for figures of which more is better.
        corpus: the text, for tasks that read one.
        limit: the first so many problems or documents only.
    """

    max_worse: float | None = Field(None, ge=0)
    max_value: float | None = None
    min_value: float | None = None
    corpus: str = "python-stdlib"
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.max_worse is None and self.max_value is None and self.min_value is None:
            raise ValueError("expected max_worse, max_value or min_value: without a bound nothing is judged")
        return self


def _bounds_fit(given: dict[str, QualityGate]) -> dict[str, QualityGate]:
    """Refuse bounds that a task cannot have, before anything is measured; lm-eval's say only then which way is up."""
    for task, wanted in given.items():
        try:
            name, _ = parse(task)
        except UnknownNameError as error:
            raise ValueError(str(error)) from error
        if name in TASKS and wanted.max_value is not None:
            raise ValueError(f"more is better of {task}: expected min_value or max_worse, found max_value")
        if name in (PERPLEXITY, KL) and wanted.min_value is not None:
            raise ValueError(f"less is better of {task}: expected max_value, found min_value")
        if name == KL and wanted.max_worse is not None:
            raise ValueError(f"{task} is a comparison already: expected max_value, found max_worse")
    return given


class Gates(Frozen):
    """The content of a gates file.

    Args:
        workload: what each timed run does; short runs make many pairs. Its rounds are prompts that take turns.
        budget_s: seconds after which engines are not opened anew, decided or not.
        alpha: the chance that may be taken of any false alarm among the speeds.
        max_foreign_cores: cores that others may keep busy; pairs measured beside more are not counted.
        speed: by metric, the share by which it may rise, such as 0.03; below nought, by which it must have fallen.
        size: likewise.
        quality: by task of ``flabc eval``.
        parity: whether the engine's own proof must hold.
    """

    workload: Workload = Workload(prompt_tokens=64, output_tokens=16, rounds=8)
    budget_s: float = Field(300, gt=0)
    alpha: float = Field(0.05, gt=0, lt=0.5)
    max_foreign_cores: float = Field(0.25, gt=0)
    speed: Annotated[dict[str, Rise], _each_known("speed", SPEEDS)] = Field({})
    size: Annotated[dict[str, Rise], _each_known("size", SIZES)] = Field({})
    quality: Annotated[dict[str, QualityGate], AfterValidator(_bounds_fit)] = Field({})
    parity: bool = True

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        if not (self.speed or self.size or self.quality or self.parity):
            raise ValueError("expected speed, size, quality or parity: these gates let everything through")
        return self


def load(file: Path) -> Gates:
    """Read a gates file.

    Raises:
        RecipeError: if it is no YAML, does not validate (every wrong field is named), or judges nothing.
    """
    return validated(Gates, read_yaml(file), str(file))
