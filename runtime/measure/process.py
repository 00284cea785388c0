"""A process of its own for an engine that is measured: opened, warmed up, asked for runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from flabc.errors import EngineError

from .result import Sample, Workload

#: Warm-up ends when a run is within this share of the one before, or after this many runs.
STEADY, MAX_WARMUPS = 0.1, 6


class Runs(Protocol):
    """What can be asked for timed runs."""

    def run(self, text: str, workload: Workload) -> Sample:
        """One timed run."""


class Pipe:
    """A process that is told what to do, one JSON line in, one out.

    Args:
        command: starts it.
        name: what it measures, for errors.
        log: where its stderr goes; None for this process's own.
    """

    def __init__(self, command: Sequence[str], name: str, log: IO[str] | None = None) -> None:
        self._pipe = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.name = name

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._pipe.pid

    def call(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Ask the worker for something.

        Raises:
            EngineError: with the worker's own words, or if it died.
        """
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        try:
            self._pipe.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
            self._pipe.stdin.flush()
            line = self._pipe.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(f"The process that measures {self.name} died.", found=f"exit code {self._pipe.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.name}: {reply['error']}")
        return reply

    def kill(self) -> None:
        """End the process at once; who waits for its answer is told that it died."""
        self._pipe.kill()

    def close(self) -> None:
        """End the process."""
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        with suppress(BrokenPipeError):  # a worker that died cannot be told
            self._pipe.stdin.close()
        self._pipe.wait()
        self._pipe.stdout.close()


class Process(Pipe):
    """A worker process and the engine it holds."""

    def __init__(self, folder: Path, *workloads: Workload) -> None:
        super().__init__([sys.executable, "-m", "flabc.runtime.measure.worker"], str(folder))
        self.folder = folder
        room = {
            "max_length": max(each.prompt_tokens + each.output_tokens for each in workloads),
            "max_batch": max(each.batch for each in workloads),
            "threads": workloads[0].threads,
            "provider": workloads[0].provider,
        }
        try:
            self.description = self.call("open", folder=str(folder), **room)
        except EngineError:
            self.close()
            raise

    @property
    def on_gpu(self) -> bool:
        """Where the engine computes."""
        return bool(self.description["on_gpu"])

    def run(self, text: str, workload: Workload) -> Sample:
        """One timed run."""
        wanted = workload.model_dump(include={"prompt_tokens", "output_tokens", "batch"})
        return Sample.model_validate(self.call("generate", text=text, **wanted))


def warm_up(process: Runs, prompt: str, workload: Workload) -> int:
    """Run until two runs in a row take about as long; how many it took."""
    before = process.run(prompt, workload).total_ms
    for count in range(2, MAX_WARMUPS + 1):
        now = process.run(prompt, workload).total_ms
        if abs(now - before) <= STEADY * before:
            return count
        before = now
    return MAX_WARMUPS


@contextmanager
def opened(folder: Path, *workloads: Workload) -> Iterator[Process]:
    """A worker process for as long as it is needed."""
    process = Process(folder, *workloads)
    try:
        yield process
    finally:
        process.close()


@contextmanager
def both_opened(first: Path, second: Path, *workloads: Workload) -> Iterator[tuple[Process, Process]]:
    """Two worker processes for as long as they are needed, opened at the same time."""
    with ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            a, b = pool.map(lambda folder: stack.enter_context(opened(folder, *workloads)), (first, second))
        yield a, b
