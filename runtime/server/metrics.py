"""Prometheus metrics, named as vLLM's are with ``flabc:`` for ``vllm:``, so that dashboards need one change.

https://docs.vllm.ai/en/latest/design/metrics.html
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from flabc.runtime.batch import Job
from flabc.runtime.scheduler import Scheduler

#: Bounds in seconds, as in vLLM.
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)


class Metrics:
    """All metrics of one server, in a registry of its own.

    Args:
        model: the label ``model_name`` of each.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        ProcessCollector(registry=self.registry)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that ended.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens produced.")
        self._cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found there.")
        self._success = Counter(
            "flabc:request_success",
            "Requests that were answered whole.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._failure = Counter(
            "flabc:request_failure",
            "Requests that were not, by the error's name.",
            ["model_name", "error"],
            registry=self.registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "Time to the first token.", FIRST)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", PER_TOKEN
        )
        self._queue = self._histogram("request_queue_time_seconds", "Time spent waiting for room.", WHOLE)
        self._whole = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", WHOLE)

    def watch(self, scheduler: Scheduler) -> None:
        """Ask a scheduler how busy it is whenever metrics are read."""
        for name, text, of in (
            ("num_requests_running", "Requests in the batch.", lambda: scheduler.load().running),
            ("num_requests_waiting", "Requests waiting for room.", lambda: scheduler.load().waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.", lambda: scheduler.load().cache),
        ):
            gauge = Gauge(f"flabc:{name}", text, ["model_name"], registry=self.registry)
            gauge.labels(self._model).set_function(of)

    def observe(self, job: Job) -> None:
        """Count a job that ended."""
        marks, tokens = job.marks, len(job.answer.tokens)
        self._generation_tokens.inc(tokens)
        if "started" in marks:
            self._prompt_tokens.inc(len(job.prompt_ids))
            self._cache_queries.inc(len(job.prompt_ids))
            self._cache_hits.inc(job.reused)
            self._queue.observe(marks["started"] - marks["made"])
        if "first" in marks:
            self._first.observe(marks["first"] - marks["made"])
        if job.error is not None:
            self._failure.labels(self._model, type(job.error).__name__).inc()
            return
        self._success.labels(self._model, job.answer.finish_reason).inc()
        self._whole.observe(marks["ended"] - marks["made"])
        if tokens > 1:
            self._per_token.observe((marks["ended"] - marks["first"]) / (tokens - 1))

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"flabc:{name}", text, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"flabc:{name}", text, ["model_name"], registry=self.registry, buckets=bounds)
        return histogram.labels(self._model)
