"""One request's jobs, in the server's event loop: the bridge between the scheduler's thread and HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial

from starlette.types import Receive

from flabc.errors import CancelledError, EngineError, FlabcError
from flabc.runtime.batch import Job, check_prompt
from flabc.runtime.sampling import SamplingParams, Token
from flabc.runtime.scheduler import Scheduler
from flabc.runtime.session import Chunk

from .problem import PromptError


class Exchange:
    """The jobs of a request; made inside the event loop.

    Args:
        scheduler: who answers.
        asked: token ids and params of each answer; params are None where nothing is to be produced.
        streamed: whether every piece of an answer is wanted, or only to know when it is whole: to wake the event loop
            for each token would take time from the engine.

    Raises:
        PromptError: if a prompt is empty, too long, or has ids that the model has not.
    """

    def __init__(
        self, scheduler: Scheduler, asked: Sequence[tuple[list[int], SamplingParams | None]], *, streamed: bool
    ) -> None:
        #: Each prompt once, however many answers it has.
        self.prompt_tokens = sum(map(len, {id(ids): ids for ids, _ in asked}.values()))
        self._prompts = [id(ids) for ids, _ in asked]
        self._streamed = streamed
        self._scheduler, self._loop = scheduler, asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Chunk | FlabcError]] = asyncio.Queue()
        self._scores: list[Future[list[Token]]] = []
        self._watching: asyncio.Task[None] | None = None
        try:
            for ids, _ in asked:
                check_prompt(scheduler.session, ids)
            self.jobs = {
                index: Job(scheduler.session, ids, params, partial(self._deliver, index))
                for index, (ids, params) in enumerate(asked)
                if params is not None
            }
        except EngineError as error:
            raise PromptError(str(error)) from error

    @property
    def cached_tokens(self) -> int:
        """Those of ``prompt_tokens`` that were known before, from other requests than this one."""
        known: dict[int, int] = {}
        for index, job in self.jobs.items():
            prompt = self._prompts[index]
            known[prompt] = min(job.reused, known.get(prompt, job.reused))
        return sum(known.values())

    def submit(self, receive: Receive, scored: Sequence[tuple[list[int], int]] = ()) -> None:
        """Hand the jobs in, and texts to score, (token ids, most likely ones wanted); cancel all when the client goes.

        Raises:
            QueueFullError: if too many others wait.
            ClosedError: if the server is shutting down.
        """
        with self.failing():
            self._scores = self._scheduler.submit(list(self.jobs.values()), scored)
        self._watching = asyncio.ensure_future(self._watch(receive))

    async def scores(self) -> list[list[Token]]:
        """Log-probabilities of the texts that are scored.

        Raises:
            CancelledError: if the client has gone.
        """
        try:
            return [await asyncio.wrap_future(score) for score in self._scores]
        except asyncio.CancelledError:
            if any(score.cancelled() for score in self._scores):
                raise CancelledError("The request was cancelled.") from None
            raise

    async def pieces(self) -> AsyncIterator[tuple[int, Chunk]]:
        """(an answer's index, its next piece), as they come, until all are whole; the last only, if not streamed.

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

    def close(self) -> None:
        """End what has not ended, and watch the client no more."""
        if self._watching is not None:
            self._watching.cancel()
        self._cancel()

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Close if this block fails."""
        try:
            yield
        except BaseException:  # the loop's own cancellation too
            self.close()
            raise

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._cancel()

    def _cancel(self) -> None:
        for job in self.jobs.values():
            job.cancel()
        for score in self._scores:
            score.cancel()

    def _deliver(self, index: int, piece: Chunk | FlabcError) -> None:
        if self._streamed or isinstance(piece, FlabcError) or piece.finish_reason:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))
