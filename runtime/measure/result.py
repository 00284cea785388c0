"""What a benchmark leaves behind: raw samples, what was measured, and where."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.spec import ModelSpec

SCHEMA_VERSION = 1


class Record(BaseModel):
    """Frozen and closed."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Workload(Record):
    """What every run does: one prompt of ``prompt_tokens``, ``output_tokens`` generated, stop tokens ignored."""

    prompt_tokens: int = Field(128, ge=1)
    output_tokens: int = Field(64, ge=2)  # time per token is measured between tokens
    rounds: int = Field(5, ge=1)
    threads: int | None = Field(None, ge=1)


class Sample(Record):
    """One run. ``token_ms`` has the time of each token after the first."""

    ttft_ms: float
    token_ms: tuple[float, ...]

    @property
    def total_ms(self) -> float:
        """From the prompt to the last token."""
        return self.ttft_ms + sum(self.token_ms)

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first."""
        return sum(self.token_ms) / len(self.token_ms)

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second of the whole run."""
        return 1000 * (1 + len(self.token_ms)) / self.total_ms


class Side(Record):
    """One engine and all that was measured of it."""

    engine: str
    spec: ModelSpec
    bytes_on_disk: int
    load_ms: float
    peak_rss_mib: float
    warmup_runs: int
    samples: tuple[Sample, ...]
    perplexity: Perplexity | None = None


class BenchResult(Record):
    """Two engines measured side by side. ``flabc.json`` beside it says what made them."""

    schema_version: int = SCHEMA_VERSION
    created: datetime
    environment: dict[str, Any]
    workload: Workload
    baseline: Side
    candidate: Side
