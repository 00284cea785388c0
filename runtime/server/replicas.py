"""Several replicas of the server behind one address, on one machine or many, by Ray Serve.

Each replica is the whole server of ``app.build`` with an engine and a scheduler of its own. Ray Serve's proxy spreads
requests over them, starts another for one that dies, and lets those that run end when all is told to stop
(docs.ray.io, Ray Serve, "Set Up FastAPI and HTTP", "Handle failures").
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from flabc.artifact import Artifact
from flabc.cluster import LOCAL, joined
from flabc.errors import EngineError, require
from flabc.runtime.backend import Limits
from flabc.runtime.scheduler import Policy
from flabc.runtime.session import Session

from .app import Access, build
from .process import STOPPING, listen

#: What Ray Serve knows the server as.
APPLICATION = "flabc"

#: Requests beyond those that run or wait which Ray Serve hands to a replica, so that it, not Ray, refuses them.
BEYOND = 16

#: Seconds between two questions whether a replica is well, and for its answer.
HEALTH_S = 2

#: Seconds that Ray Serve gives its proxy to start (5 by itself, and it gives up for good after 60): on a machine that
#: works, importing it takes longer.
PROXY_STARTS = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "55")


@dataclass(frozen=True)
class Replicas:
    """How many there are, and where.

    Args:
        count: replicas.
        address: see ``cluster.joined``; the engine's folder must lie at the same path on every node.
    """

    count: int = 2
    address: str = LOCAL


def serve(
    folder: Path,
    name: str,
    limits: Limits,
    policy: Policy,
    access: Access,
    replicas: Replicas,
    *,
    host: str,
    port: int,
    drain_s: float,
    started: Callable[[int], None],
) -> None:
    """Serve until told to stop by SIGTERM or SIGINT; the first lets all accepted requests end, the second does not.

    Args:
        folder: the engine's.
        name: what clients call the model.
        limits: of each replica; without threads each has its share of the cores.
        policy: of each replica.
        access: who may ask.
        replicas: how many, and where.
        host: the address to listen on.
        port: 0 takes any that is free.
        drain_s: seconds that accepted requests have to end.
        started: called with the port when requests are answered.

    Raises:
        MissingExtraError: if Ray is not installed.
        UsageError: if there is no such cluster.
        EngineError: if the address cannot be had, or the engine cannot be opened.
    """
    require("ray.serve", "distributed")
    with listen(host, port) as probe:  # told now and in our words, not by a proxy's trace
        port = probe.getsockname()[1]
    limits = replace(limits, threads=limits.threads or max(1, (os.cpu_count() or 1) // replicas.count))
    if Artifact.is_at(folder):
        _ = Artifact.open(folder).model  # damage is told now as well; the replicas run it, and this host may not
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    os.environ.setdefault(*PROXY_STARTS)  # Ray's processes take it from here
    with joined(replicas.address) as ray:
        told = _Told()  # after Ray, which takes SIGTERM for a crash
        try:
            ray.serve.start(http_options={"host": host, "port": port})
            try:
                ray.serve.run(
                    _deployment(ray, folder.resolve(), name, limits, policy, access, replicas.count, drain_s),
                    name=APPLICATION,
                )
            except RuntimeError as error:  # Ray Serve's word for a deployment that did not come up
                raise EngineError(f"The replicas did not start: {error}") from error
            started(port)
            told.wait()
            ray.serve.delete(APPLICATION)  # waits for the requests that run
        finally:
            ray.serve.shutdown()


def _deployment(
    ray: Any,
    folder: Path,
    name: str,
    limits: Limits,
    policy: Policy,
    access: Access,
    count: int,
    drain_s: float,
) -> Any:
    def opened() -> FastAPI:
        return build(Session.open(folder, limits=limits), name, policy, access)

    @ray.serve.ingress(opened)
    class Replica:
        app: FastAPI  # Ray Serve's, from ``opened``

        def check_health(self) -> None:
            if not self.app.state.served.scheduler.alive:
                raise RuntimeError("the scheduler has ended")

    kind = ray.serve.deployment(
        num_replicas=count,
        max_ongoing_requests=limits.max_batch + policy.max_queue + BEYOND,
        ray_actor_options={"num_cpus": limits.threads},
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=10 * HEALTH_S,  # a long prompt keeps the cores busy, which is no illness
        graceful_shutdown_timeout_s=drain_s,
    )
    return kind(Replica).bind()


class _Told:
    """Whether somebody told this process to stop; told twice, it ends at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in STOPPING:
            signal.signal(number, self._take)

    def _take(self, number: int, _: object) -> None:
        if self._event.is_set():
            os._exit(128 + number)
        self._event.set()

    def wait(self) -> None:
        """Until told."""
        self._event.wait()
