"""The server's process: socket, signals, and an end that leaves no accepted request unanswered."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI

from flabc.errors import EngineError
from flabc.runtime.scheduler import Scheduler

from .guard import LOG, JsonLines

#: Seconds in which connections may be closed once all is answered.
CLOSING_S = 5

STOPPING = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int, patience_s: float | None = None) -> socket.socket:
    """A socket on an address; port 0 takes any that is free.

    Args:
        host: the address.
        port: the port.
        patience_s: seconds after which a connection is dropped whose client takes nothing of what it is sent; where
            the system has such a bound (Linux, tcp(7)).

    Raises:
        EngineError: if the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise EngineError(f"Cannot listen on {host}:{port}: {error.strerror}", fix="Give another --port.") from error
    if patience_s is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
        # Connections inherit it. Only the kernel can end one: closing it in asyncio waits for the client to read.
        most = min(2**31 - 1, math.ceil(1000 * patience_s))
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, most)
    return listening


def serve(app: FastAPI, listening: socket.socket, *, drain_s: float, started: Callable[[], None]) -> None:
    """Serve until told to stop by SIGTERM or SIGINT; the first lets all accepted requests end, the second does not.

    Args:
        app: what ``app.build`` made.
        listening: from ``listen``.
        drain_s: seconds that accepted requests have to end.
        started: called when requests are answered.
    """
    _log_json()
    scheduler: Scheduler = app.state.served.scheduler
    config = uvicorn.Config(
        app,
        loop="asyncio",  # this and the parser whatever else is installed: what was tested is what runs
        http="h11",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=CLOSING_S,
        server_header=False,
    )
    try:
        _Server(config, scheduler, drain_s, started).run(sockets=[listening])
    finally:
        scheduler.close()


class _Server(uvicorn.Server):
    """uvicorn, which goes on answering probes and telling clients of it while requests end."""

    def __init__(
        self, config: uvicorn.Config, scheduler: Scheduler, drain_s: float, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._scheduler, self._drain_s, self._when_started = scheduler, drain_s, started
        self._draining: threading.Thread | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._when_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals; unlike uvicorn's own, do not die of them once all is done."""
        before = {number: signal.signal(number, self.handle_exit) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends at once."""
        if self._draining is not None:
            os._exit(128 + sig)
        self._draining = threading.Thread(target=self._drain, daemon=True)
        self._draining.start()

    def _drain(self) -> None:
        try:
            load = self._scheduler.load()
            LOG.info("draining", extra={"fields": {"live": load.running + load.waiting}})
            if not self._scheduler.drain(self._drain_s):
                LOG.warning("requests were cut off", extra={"fields": {"after_s": self._drain_s}})
                self._scheduler.close()
        finally:  # whatever went wrong, it was told to stop
            self.should_exit = True


def _log_json() -> None:
    """Log JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("flabc", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
