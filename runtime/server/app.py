"""Routes: OpenAI's completions, chat completions and models; health, readiness and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from flabc.errors import EngineError, FlabcError, UsageError
from flabc.runtime.sampling import Token
from flabc.runtime.scheduler import Policy, Scheduler
from flabc.runtime.session import Session

from . import problem
from .exchange import Exchange
from .guard import AccessLog, ApiKeys, BodyLimit
from .metrics import Metrics
from .problem import ModelNotFoundError, PromptError
from .reply import Reply
from .schema import COMPLETION_TOKENS, Body, ChatBody, Completion, CompletionBody, Model, Models, Problem

SAID: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}},
    "4XX": {"model": Problem, "description": "The request cannot be answered as it is"},
    "5XX": {"model": Problem, "description": "The server cannot answer"},
}
FAULTS: dict[int | str, dict[str, Any]] = {key: value for key, value in SAID.items() if key != 200}

api, probes = APIRouter(), APIRouter()


@dataclass(frozen=True)
class Access:
    """Who may ask, and how much at once.

    Args:
        keys: keys of which a request must have one; none means that anybody may ask.
        max_body: bytes of a request's body at most.
    """

    keys: Sequence[str] = ()
    max_body: int = 2**20


@dataclass(frozen=True)
class Served:
    """What the routes serve."""

    name: str
    scheduler: Scheduler
    metrics: Metrics
    since: int = field(default_factory=lambda: int(time.time()))

    @property
    def session(self) -> Session:
        """The engine's, of which only the text is for the event loop's thread."""
        return self.scheduler.session


def build(session: Session, name: str, policy: Policy, access: Access) -> FastAPI:
    """The application, its scheduler running; ``app.state.served`` has it."""
    metrics = Metrics(name)
    served = Served(name, Scheduler(session, policy, metrics.observe), metrics)
    metrics.watch(served.scheduler)
    app = FastAPI(title="flabc", version=metadata.version("flabc"), docs_url=None, redoc_url=None)
    app.state.served = served
    app.include_router(api)
    app.include_router(probes)
    app.add_middleware(BodyLimit, max_body=access.max_body, max_s=policy.timeout_s)
    app.add_middleware(ApiKeys, keys=access.keys)
    app.add_middleware(AccessLog)
    app.add_exception_handler(FlabcError, lambda _, error: problem.response(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: problem.invalid(error))
    app.add_exception_handler(HTTPException, lambda _, error: problem.http(error))
    return app


@api.get("/v1/models", response_model=Models, responses=FAULTS)
async def models(request: Request) -> Models:
    """The model that is served."""
    return Models(data=[_model(request.app.state.served)])


@api.get("/v1/models/{name:path}", response_model=Model, responses=FAULTS)
async def model(request: Request, name: str) -> Model:
    """The model of that name."""
    _check_name(request.app.state.served, name)
    return _model(request.app.state.served)


@api.post("/v1/completions", response_model=Completion, responses=SAID)
async def completions(request: Request, body: CompletionBody) -> Response:
    """Go on from prompts."""
    served: Served = request.app.state.served
    wanted = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    scored = body.logprobs if body.echo else None
    _check(served, body, len(body.prompts) * (body.choices * bool(wanted) + (scored is not None)))
    if wanted == 0 and not body.echo:
        raise UsageError("max_tokens is 0.", expected="at least 1, or 'echo': true")
    prompts = await asyncio.to_thread(_encoded, served, body.prompts)
    params = [body.params(n, wanted, body.logprobs) if wanted else None for n in range(body.choices)]
    asked = [(ids, each) for ids in prompts for each in params]
    exchange = Exchange(served.scheduler, asked, streamed=bool(body.stream))
    exchange.submit(request.receive, [] if scored is None else [(ids, scored) for ids in prompts])
    echoes = await _echoes(served, exchange, prompts, body) if body.echo else [("", list[Token]())] * len(prompts)
    each = [echo for echo in echoes for _ in range(body.choices)]
    reply = Reply(served.session.codec, served.name, chat=False, scored=body.logprobs is not None, echoes=each)
    return await _answered(request, exchange, reply, body)


@api.post("/v1/chat/completions", response_model=Completion, responses=SAID)
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a conversation through the model's own template."""
    served: Served = request.app.state.served
    _check(served, body, body.choices)
    messages = [message.plain for message in body.messages]
    try:
        ids = await asyncio.to_thread(served.session.encode, messages)
    except EngineError as error:  # no template, or one that refuses
        raise PromptError(str(error)) from error
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if wanted == 0:
        raise UsageError("max_tokens is 0.", expected="at least 1")
    top = (body.top_logprobs or 0) if body.logprobs else None
    room = served.session.backend.limits.max_length
    params = [body.params(n, wanted or room, top) for n in range(body.choices)]
    exchange = Exchange(served.scheduler, [(ids, each) for each in params], streamed=bool(body.stream))
    exchange.submit(request.receive)
    reply = Reply(
        served.session.codec, served.name, chat=True, scored=top is not None, echoes=[("", [])] * body.choices
    )
    return await _answered(request, exchange, reply, body)


@probes.get("/health", responses=FAULTS)
async def health(request: Request) -> JSONResponse:
    """Whether the process works; if not, it should be started anew."""
    alive = request.app.state.served.scheduler.alive
    return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 500)


@probes.get("/ready", responses=FAULTS)
async def ready(request: Request) -> JSONResponse:
    """Whether requests are accepted; no longer once it is shutting down."""
    accepting = request.app.state.served.scheduler.accepting
    return JSONResponse({"status": "ready" if accepting else "draining"}, 200 if accepting else 503)


@probes.get("/metrics", response_class=PlainTextResponse)
async def prometheus(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(request.app.state.served.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _model(served: Served) -> Model:
    return Model(id=served.name, created=served.since, max_model_len=served.session.backend.limits.max_length)


def _check_name(served: Served, name: str) -> None:
    if name != served.name:
        raise ModelNotFoundError(f"The model {name!r} is not served here.", expected=served.name)


def _check(served: Served, body: Body, places: int) -> None:
    """Refuse what can be refused before its prompts are looked at; each answer and each scored prompt takes a place."""
    _check_name(served, body.model)
    body.check()
    most = served.session.backend.limits.max_batch + served.scheduler.policy.max_queue
    if places > most:
        raise UsageError(f"{places} answers and scores were asked for at once.", expected=f"at most {most}")
    served.scheduler.check(places)


def _encoded(served: Served, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    return [served.session.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


async def _echoes(
    served: Served, exchange: Exchange, prompts: Sequence[list[int]], body: CompletionBody
) -> list[tuple[str, list[Token]]]:
    """For each prompt its text, and its tokens with their log-probabilities if they were asked for."""
    given = [prompt if isinstance(prompt, str) else served.session.codec.decode_all(prompt) for prompt in body.prompts]
    with exchange.failing():
        scores = await exchange.scores()
    if not scores:
        return [(text, []) for text in given]
    tokens = [[Token(ids[0]), *found] for ids, found in zip(prompts, scores, strict=True)]
    return list(zip(given, tokens, strict=True))


async def _answered(request: Request, exchange: Exchange, reply: Reply, body: Body) -> Response:
    """The reply, whole or as a stream."""
    request.scope["flabc.exchange"] = exchange
    if not body.stream:
        with closing(exchange):
            return JSONResponse(await reply.whole(exchange))

    async def events() -> AsyncIterator[str]:
        with closing(exchange):
            async for event in reply.events(exchange, with_usage=body.with_usage):
                yield event

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
