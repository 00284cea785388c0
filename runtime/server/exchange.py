"""One request's jobs, in the server's event loop: the bridge between the scheduler's thread and HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from flabc.errors import EngineError, FlabcError
from flabc.runtime.batch import Job
from flabc.runtime.sampling import SamplingParams, Token
from flabc.runtime.scheduler import Scheduler
from flabc.runtime.session import Chunk

from .problem import PromptError


class Exchange:
    """The jobs of a request; made inside the event loop.

    Args:
        scheduler: who answers.
        asked: token ids and params of each answer; params are None where nothing is to be produced.

    Raises:
        PromptError: if a prompt is empty, too long, or has ids that the model has not.
    """

    def __init__(self, scheduler: Scheduler, asked: Sequence[tuple[list[int], SamplingParams | None]]) -> None:
        #: Each prompt once, however many answers it has.
        self.prompt_tokens = sum(map(len, {id(ids): ids for ids, _ in asked}.values()))
        self._scheduler, self._loop = scheduler, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Chunk | FlabcError]] = asyncio.Queue()
        self._scores: list[Future[list[Token]]] = []
        try:
            self.jobs = {
                index: Job(scheduler.session, ids, params, partial(self._deliver, index))
                for index, (ids, params) in enumerate(asked)
                if params is not None
            }
        except EngineError as error:
            raise PromptError(str(error)) from error

    def submit(self, scored: Sequence[tuple[list[int], int]] = ()) -> None:
        """Hand the jobs in, and texts to score, (token ids, most likely ones wanted).

        Raises:
            QueueFullError: if too many others wait.
            ClosedError: if the server is shutting down.
        """
        self._scheduler.submit(list(self.jobs.values()))
        for ids, top in scored:
            self._scores.append(self._scheduler.score(ids, top))

    async def scores(self) -> list[list[Token]]:
        """Log-probabilities of the texts that are scored."""
        return [await asyncio.wrap_future(score) for score in self._scores]

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(an answer's index, its next piece), as they come, until all answers are whole.

        Raises:
            FlabcError: if one of them cannot be.
        """
        left = len(self.jobs)
        while left:
            index, piece = await self._pieces.get()
            if isinstance(piece, FlabcError):
                raise piece
            left -= piece.finish_reason is not None
            yield index, piece

    def cancel(self) -> None:
        """End what has not ended."""
        for job in self.jobs.values():
            job.cancel()
        for score in self._scores:
            score.cancel()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Cancel if this block fails."""
        try:
            yield
        except BaseException:  # the loop's own cancellation too
            self.cancel()
            raise

    @asynccontextmanager
    async def watched(self, receive: Any) -> AsyncIterator[None]:
        """Cancel when the client goes, or this block is left early."""
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            yield
        finally:
            watch.cancel()
            self.cancel()

    async def _watch(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    def _deliver(self, index: int, piece: Chunk | FlabcError) -> None:
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
