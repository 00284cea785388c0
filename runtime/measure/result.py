"""What a benchmark leaves behind: raw samples, what was measured, and where."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from flabc.frozen import Frozen
from flabc.runtime.evaluate.perplexity import Perplexity
from flabc.spec import ModelSpec

SCHEMA_VERSION = 3


class Workload(Frozen):
    """What every run does: prompts of ``prompt_tokens``, ``output_tokens`` generated for each, stop tokens ignored.

    ``batch`` prompts run at once; they are as long as each other, so that the work is the same in every run.
    """

    prompt_tokens: int = Field(128, ge=1)
    batch: int = Field(1, ge=1)
    output_tokens: int = Field(64, ge=2)  # time per token is measured between tokens
    rounds: int = Field(3, ge=1)
    threads: int | None = Field(None, ge=1)
    provider: str = "auto"


class Sample(Frozen):
    """One run.

    Args:
        ttft_ms: until the first token.
        token_ms: the time of each token after it, of every sequence of the batch at once.
        opening: which of its engine's processes it is of, counted from 0.
    """

    ttft_ms: float
    token_ms: tuple[float, ...]
    opening: int = 0

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
    """One engine and all that was measured of it.

    Args:
        load_ms: until it was open; the median of its openings.
        peak_rss_mib: of its process, in the host's memory; the largest of its openings.
        warmup_runs: of all openings.
        bytes_per_token: the weights that an output token reads.
        on_gpu: where it computed.
    """

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
    on_gpu: bool = False


class LoadPlan(Frozen):
    """Requests to a scheduler, as many as come or as are there, of the workload's prompts and outputs.

    Args:
        concurrency: closed loops of so many clients, each of which asks again as soon as it is answered.
        arrival_rate: open loops: so many requests per second on average, at random times (a Poisson process), however
            long those before take.
        requests: that are counted in a run; in a closed loop the next multiple of its clients.
        max_batch: sequences that the scheduler runs at once; the others wait.
    """

    concurrency: tuple[Annotated[int, Field(ge=1)], ...] = ()
    arrival_rate: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = ()
    requests: int = Field(32, ge=2)
    max_batch: int = Field(16, ge=1)


class Request(Frozen):
    """One request, all in ms since its run began.

    Args:
        arrived_ms: when it was to be asked; latency counts from here, so that a client that was late hides nothing.
        asked_ms: when the scheduler was given it.
        started_ms: when it left the queue.
        first_ms: when its first token was delivered.
        done_ms: when its last token was.
    """

    arrived_ms: float
    asked_ms: float
    started_ms: float
    first_ms: float
    done_ms: float

    @property
    def latency_ms(self) -> float:
        """From end to end, waiting included."""
        return self.done_ms - self.arrived_ms

    @property
    def ttft_ms(self) -> float:
        """Until the first token, waiting included."""
        return self.first_ms - self.arrived_ms

    @property
    def queue_ms(self) -> float:
        """Until it left the queue."""
        return self.started_ms - self.arrived_ms


class LoadRun(Frozen):
    """A run of requests.

    Args:
        requests: all that were answered, in the order in which they were.
        warmup_requests: the first so many are not counted.
        began_ms: when counting began: with the last request of the warm-up.
        seed: what the arrivals were drawn from; None in a closed loop.
    """

    requests: tuple[Request, ...]
    warmup_requests: int = 0
    began_ms: float = 0.0
    seed: int | None = None

    @property
    def counted(self) -> Sequence[Request]:
        """Those that figures are of."""
        return self.requests[self.warmup_requests :]

    @property
    def window_ms(self) -> float:
        """How long was counted, until the last answer."""
        return self.requests[-1].done_ms - self.began_ms


class LoadCell(Frozen):
    """Runs of both sides under one load: a closed loop of ``concurrency`` clients, or arrivals at ``arrival_rate``.

    ``foreign_cores`` are those that others kept busy meanwhile, on average.
    """

    concurrency: int | None = None
    arrival_rate: float | None = None
    baseline: tuple[LoadRun, ...]
    candidate: tuple[LoadRun, ...]
    foreign_cores: float


class LoadResult(Frozen):
    """What was measured under load."""

    plan: LoadPlan
    cells: tuple[LoadCell, ...]


class BenchResult(Frozen):
    """Two engines measured side by side. ``flabc.json`` beside it says what made them.

    Both were opened several times, beside each other, and the workload's rounds measured in each opening.
    ``foreign_cores`` has the cores that others kept busy, on average, during each round; ``sweep`` what was measured at
    other lengths and batches, ``load`` what of requests that come at their own times. ``grid_g_per_kwh`` is what
    somebody said that the machine's electricity costs in CO2.
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
    load: LoadResult | None = None

    @property
    def openings(self) -> int:
        """How often both engines were opened."""
        return len({sample.opening for sample in self.baseline.samples})
