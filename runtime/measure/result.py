"""What a benchmark leaves behind: raw samples, what was measured, and where."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import Field

from flabc.frozen import Frozen
from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.spec import ModelSpec

SCHEMA_VERSION = 2


class Workload(Frozen):
    """What every run does: prompts of ``prompt_tokens``, ``output_tokens`` generated for each, stop tokens ignored.

    ``batch`` prompts run at once; they are as long as each other, so that the work is the same in every run.
    """

    prompt_tokens: int = Field(128, ge=1)
    batch: int = Field(1, ge=1)
    output_tokens: int = Field(64, ge=2)  # time per token is measured between tokens
    rounds: int = Field(5, ge=1)
    threads: int | None = Field(None, ge=1)
    provider: str = "auto"


class Sample(Frozen):
    """One run. ``token_ms`` has the time of each token after the first, of every sequence of the batch at once."""

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
        """Output tokens per second of the whole run, of each sequence."""
        return 1000 * (1 + len(self.token_ms)) / self.total_ms


class Cell(Frozen):
    """Runs of both sides at another length of prompts or another batch."""

    prompt_tokens: int
    batch: int
    baseline: tuple[Sample, ...]
    candidate: tuple[Sample, ...]


class Roofline(Frozen):
    """What the machine can do at best.

    Args:
        bandwidth_gib_s: memory read per second by all cores, GiB/s.
        gflops: float32 multiply-adds of large matrices per second by numpy's BLAS on all cores, each counted as two
            operations, 1e9/s.
    """

    bandwidth_gib_s: float
    gflops: float


class Energy(Frozen):
    """What a counter read; ``joules_per_token`` is None where there is none, and ``missing`` says why.

    Args:
        counter: which one.
        joules_per_token: above idle, prompt included.
        idle_w: what the machine used while nothing ran, W; it is taken off.
        window_s: how long was counted.
        tokens: output tokens made meanwhile.
        missing: why nothing could be read.
    """

    counter: str | None = None
    joules_per_token: float | None = None
    idle_w: float | None = None
    window_s: float | None = None
    tokens: int | None = None
    missing: str | None = None


class Side(Frozen):
    """One engine and all that was measured of it; ``bytes_per_token`` are the weights that an output token reads."""

    engine: str
    spec: ModelSpec
    bytes_on_disk: int
    load_ms: float
    peak_rss_mib: float
    warmup_runs: int
    samples: tuple[Sample, ...]
    perplexity: Perplexity | None = None
    bytes_per_token: int | None = None
    energy: Energy | None = None


class BenchResult(Frozen):
    """Two engines measured side by side. ``flabc.json`` beside it says what made them.

    ``foreign_cores`` has the cores that others kept busy, on average, during each round; ``sweep`` what was measured
    at other lengths and batches. ``grid_g_per_kwh`` is what somebody said that the machine's electricity costs in CO2.
    """

    schema_version: int = SCHEMA_VERSION
    created: datetime
    environment: dict[str, Any]
    workload: Workload
    baseline: Side
    candidate: Side
    roofline: Roofline | None = None
    foreign_cores: tuple[float, ...] = ()
    sweep: tuple[Cell, ...] = ()
    grid_g_per_kwh: float | None = None
