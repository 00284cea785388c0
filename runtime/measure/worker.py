"""A process that holds one engine and does what it is told, one JSON line in, one out.

``python -m flabc.runtime.measure.worker``: each side of a comparison gets its own, so that neither pays for the
other's memory or start-up.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from flabc.errors import EngineError, FlabcError
from flabc.runtime.backend import Limits, on_gpu
from flabc.runtime.evaluate.perplexity import perplexity
from flabc.runtime.sampling import SamplingParams
from flabc.runtime.session import Session

from .load import run_load

#: What Linux says of this process.
STATUS = Path("/proc/self/status")


class Worker:
    """Answers requests about one engine."""

    def __init__(self, folder: str, max_length: int, max_batch: int, threads: int | None, provider: str) -> None:
        started = time.perf_counter()
        limits = Limits(max_length=max_length, max_batch=max_batch, threads=threads, provider=provider)
        self.session = Session.open(folder, limits=limits)
        self.load_ms = 1000 * (time.perf_counter() - started)

    def describe(self) -> dict[str, Any]:
        """The engine's spec, whether it runs on a GPU, and what opening it took."""
        backend = self.session.backend
        gpu = on_gpu(backend.name, backend.limits.provider)
        return {"spec": backend.spec.model_dump(), "on_gpu": gpu, "load_ms": self.load_ms}

    def generate(self, text: str, prompt_tokens: int, output_tokens: int, batch: int) -> dict[str, Any]:
        """One run on the first ``prompt_tokens`` tokens of a text, timed token by token; in a batch all rows begin so.

        Raises:
            EngineError: if the text is too short, or fewer tokens came than were asked for.
        """
        ids = self._prompt(text, prompt_tokens)
        marks = [time.perf_counter()]
        for _ in self._steps(ids, output_tokens, batch):
            marks.append(time.perf_counter())
        # The contract of the workload: a run that stopped early must not look fast.
        if len(marks) != output_tokens + 1:
            raise EngineError(
                "The run produced too few tokens.", expected=str(output_tokens), found=str(len(marks) - 1)
            )
        gaps = [1000 * (b - a) for a, b in pairwise(marks)]
        return {"ttft_ms": gaps[0], "token_ms": gaps[1:]}

    def load(
        self,
        texts: list[str],
        prompt_tokens: int,
        output_tokens: int,
        requests: int,
        concurrency: int | None = None,
        arrival_rate: float | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Requests on a scheduler, their prompts the first tokens of the texts in turns; see ``run_load``.

        Raises:
            EngineError: if a text is too short, or an answer.
        """
        return run_load(
            self.session,
            [self._prompt(text, prompt_tokens) for text in texts],
            output_tokens,
            requests=requests,
            concurrency=concurrency,
            arrival_rate=arrival_rate,
            seed=seed,
        ).model_dump()

    def _prompt(self, text: str, prompt_tokens: int) -> list[int]:
        """The first tokens of a text."""
        ids = self.session.codec.encode_plain(text)[:prompt_tokens]
        if len(ids) < prompt_tokens:
            raise EngineError(
                "The text for the prompt is too short.",
                expected=f"{prompt_tokens} tokens",
                found=str(len(ids)),
            )
        return ids

    def _steps(self, ids: list[int], output_tokens: int, batch: int) -> Iterator[object]:
        """The steps of a run: for one sequence as a user takes them, for more as a scheduler does."""
        if batch == 1:
            yield from self.session.tokens(ids, SamplingParams(max_tokens=output_tokens, ignore_eos=True))
            return
        backend, ones = self.session.backend, np.ones(batch, np.int64)
        backend.start(batch)
        new = np.tile(np.array(ids, np.int64), (batch, 1))
        for _ in range(min(output_tokens, self.session.room(ids))):
            new = backend.extend(new, ones * new.shape[1]).argmax(-1)[:, None]
            yield new

    def memory(self) -> dict[str, Any]:
        """The most memory this process has held so far."""
        if STATUS.is_file():
            fields = dict(line.split(":", 1) for line in STATUS.read_text(encoding="utf-8").splitlines())
            return {"peak_rss_mib": int(fields["VmHWM"].split()[0]) / 1024}
        # Not so on Linux, where this begins with the memory of whoever started the process.
        unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
        return {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}

    def score(self, texts: list[str]) -> dict[str, Any]:
        """Perplexity on texts."""
        return perplexity(self.session.backend, self.session.codec, texts).model_dump()


def main() -> None:
    """Serve requests from stdin until it closes. The first opens the engine."""
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if worker is None:
                worker = Worker(**request["arguments"])
                reply = worker.describe()
            else:
                method: Callable[..., dict[str, Any]] = getattr(worker, request["call"])
                reply = method(**request["arguments"])
        except FlabcError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
