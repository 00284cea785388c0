"""What stands before the routes: the log's line of each request, API keys, and the size of bodies. Plain ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import problem
from .exchange import Exchange
from .reply import usage

LOG = logging.getLogger("flabc.server")


class JsonLines(logging.Formatter):
    """One JSON object per record; ``extra={"fields": {...}}`` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class AccessLog:
    """Names every request, logs how it ended, and turns what nobody expected into an error object.

    Neither prompts nor answers are logged, nor keys or addresses.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        name, begun, status = f"req-{uuid.uuid4().hex}", time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception:
            LOG.exception("request failed", extra={"fields": {"request_id": name}})
            if not status:
                await JSONResponse(problem.body("The server failed.", 500), 500)(scope, receive, named)
        finally:
            fields = {"request_id": name, "method": scope["method"], "path": scope["path"], "status": status}
            fields["ms"] = round(1000 * (time.monotonic() - begun), 1)
            LOG.info("request", extra={"fields": fields | _of_exchange(scope.get("flabc.exchange"))})
        return None


class ApiKeys:
    """Lets requests to ``/v1`` pass that have one of the keys, compared in constant time."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app, self._digests = app, [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it with 401."""
        if self._digests and scope["type"] == "http" and scope["path"].startswith("/v1/") and not self._known(scope):
            told = problem.body("The API key is missing or wrong.", 401, "invalid_api_key")
            refusal = JSONResponse(told, 401, {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        return await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        # Of two, a proxy before this server may have looked at the other one.
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = _digest(key.strip())
        # All are compared, so that time does not tell which was near.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


class BodyLimit:
    """Refuses bodies of more than so many bytes with 413, and such as are not there after so many seconds with 408.

    Their size is what they say and what they are.
    """

    def __init__(self, app: ASGIApp, max_body: int, max_s: float | None) -> None:
        self._app, self._max_body, self._max_s = app, max_body, max_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, counting."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > self._max_body:
            return await problem.http(self._too_large())(scope, receive, send)
        read, whole = 0, False
        latest = None if self._max_s is None else asyncio.get_running_loop().time() + self._max_s

        async def counted() -> Message:
            nonlocal read, whole
            try:
                async with asyncio.timeout_at(None if whole else latest):
                    message = await receive()
            except TimeoutError:
                told = f"The body was not there after {self._max_s:g} s."
                raise HTTPException(408, told, {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise self._too_large()
            whole = not message.get("more_body", False)
            return message

        return await self._app(scope, counted, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self._max_body} bytes.", {"Connection": "close"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _of_exchange(exchange: Exchange | None) -> dict[str, Any]:
    """What a request's jobs took, for the log."""
    if exchange is None:
        return {}
    counted = usage(exchange)
    fields = {name: counted[name] for name in ("prompt_tokens", "completion_tokens")}
    reasons = [type(job.error).__name__ if job.error else job.answer.finish_reason for job in exchange.jobs.values()]
    marks = [job.marks for job in exchange.jobs.values()]
    fields["finish_reasons"] = reasons
    for name, end in (("queue_ms", "started"), ("ttft_ms", "first")):
        fields[name] = [round(1000 * (mark[end] - mark["made"]), 1) for mark in marks if end in mark]
    return fields
