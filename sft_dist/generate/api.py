"""The OpenAI-compatible application: a FastAPI app around one engine."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from sft_dist.errors import SftError
from sft_dist.generate.api_answers import Form, event
from sft_dist.generate.api_schema import RequestError, chat_request, completion_request
from sft_dist.generate.engine import Answer, Generation, PromptTooLong, Sampling
from sft_dist.generate.load import Loaded

UNKNOWN_KEY = RequestError(
    "Incorrect API key provided: send the key of this server as Authorization: Bearer KEY",
    status=401, code="invalid_api_key",
)  # fmt: skip
MAX_BODY_BYTES = 16 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class Service:
    """
    Args:
        aliases: what requests may call the model, beside its name.
        api_key: that requests have to show; None: none.
        hosts: names under which the server may be asked, so that no web page can by a name of its own; None: any.
        created: when it began, in seconds since 1970.
    """

    loaded: Loaded
    aliases: frozenset[str]
    api_key: str | None
    hosts: tuple[str, ...] | None
    max_new_tokens: int
    created: int


def make_app(service: Service) -> FastAPI:
    """The application; it answers one request after the other, in the order in which they came."""
    app = FastAPI(title="sft-dist", docs_url=None, redoc_url=None, openapi_url=None)
    asked = _Asked(service)
    _add_errors(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        asked.admit(request)
        return {"object": "list", "data": [asked.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> dict[str, Any]:
        asked.admit(request)
        asked.check_model(name)
        return asked.model()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked.admit(request)
        wanted = chat_request(await _body(request))
        asked.check_model(wanted.model)
        prompt = service.loaded.prompter.chat([message.message() for message in wanted.messages])
        form = Form(service.loaded.name, is_chat=True, includes_usage=wanted.includes_usage)
        sampling = wanted.sampling(max_new_tokens=service.max_new_tokens)
        return await asked.respond(request, prompt, sampling, form, streams=bool(wanted.stream))

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked.admit(request)
        wanted = completion_request(await _body(request))
        asked.check_model(wanted.model)
        prompt = service.loaded.prompter.complete(wanted.prompt)
        form = Form(service.loaded.name, is_chat=False, includes_usage=wanted.includes_usage)
        sampling = wanted.sampling(max_new_tokens=service.max_new_tokens)
        return await asked.respond(request, prompt, sampling, form, streams=bool(wanted.stream))

    return app


class _Asked:
    """What the endpoints share: who may ask for what, and whose turn it is."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # First come, first served; a client that leaves while it waits is forgotten.
        self._turn = asyncio.Lock()

    def admit(self, request: Request) -> None:
        """Raises ``RequestError``: the request lacks the key, or comes from a web page that found its way here."""
        host = urlsplit(f"//{request.headers.get('host', '')}").hostname
        if self._service.hosts is not None and host not in self._service.hosts:
            raise RequestError(f"this server is not {host}", status=421)
        if self._service.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # A header's bytes come as Latin-1.
        given, expected = key.encode("latin-1"), self._service.api_key.encode()
        if scheme.lower() != "bearer" or not secrets.compare_digest(given, expected):
            raise UNKNOWN_KEY

    def check_model(self, name: str) -> None:
        own = self._service.loaded.name
        if name != own and name not in self._service.aliases:
            raise RequestError(
                f"The model {name!r} does not exist: this server has {own!r}", status=404, param="model",
                code="model_not_found",
            )  # fmt: skip

    def model(self) -> dict[str, Any]:
        created = self._service.created
        return {"id": self._service.loaded.name, "object": "model", "created": created, "owned_by": "sft-dist"}

    async def respond(
        self, request: Request, prompt: list[int], sampling: Sampling, form: Form, *, streams: bool
    ) -> Response:
        try:
            self._service.loaded.engine.room(len(prompt))
        except PromptTooLong as error:
            param = "messages" if form.is_chat else "prompt"
            raise RequestError(error.what, param=param, code="context_length_exceeded") from error
        if streams:
            events = self._events(prompt, sampling, form)
            return _Stream(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answer = await _unless_gone(request, self._whole(prompt, sampling))
        # Nobody reads what is said to a client that has gone; 499 is what servers write into their logs.
        return Response(status_code=499) if answer is None else JSONResponse(form.whole(answer))

    async def _whole(self, prompt: list[int], sampling: Sampling) -> Answer:
        async with self._turn:
            generation = self._service.loaded.engine.start(self._service.loaded.tuned, prompt, sampling)
            async with aclosing(_pieces(generation)) as pieces:
                async for _ in pieces:
                    pass
            return generation.answer

    async def _events(self, prompt: list[int], sampling: Sampling, form: Form) -> AsyncGenerator[str, None]:
        async with self._turn:
            try:
                generation = self._service.loaded.engine.start(self._service.loaded.tuned, prompt, sampling)
                for line in form.begin():
                    yield line
                async with aclosing(_pieces(generation)) as pieces:
                    async for piece in pieces:
                        yield form.piece(piece)
                for line in form.end(generation.answer):
                    yield line
            except Exception as error:
                # The status has been sent: the error is an event, as clients of the API expect it.
                traceback.print_exception(error, file=sys.stderr)
                yield event(_error_of(error).body())


class _Stream(StreamingResponse):
    """Closes its events when the client has gone, and not when Python finds the time: the next one waits for it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            assert isinstance(self.body_iterator, AsyncGenerator)
            with anyio.CancelScope(shield=True):
                await self.body_iterator.aclose()


async def _pieces(generation: Generation) -> AsyncGenerator[str, None]:
    """What a generation says, without holding up the server; ended early, it ends the generation."""
    iterator = iter(generation)
    try:
        while (piece := await asyncio.to_thread(next, iterator, None)) is not None:
            yield piece
    finally:
        # Also when the client has gone, and this is cancelled where it waits: the engine must be free for the next.
        with anyio.CancelScope(shield=True):
            await asyncio.to_thread(generation.cancel)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """The result, or None if the client went before it was there; the work is then given up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Any:
    """Raises ``RequestError``."""
    # A web page may send other types to any server without asking it first.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("send the request as Content-Type: application/json", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request is larger than {MAX_BODY_BYTES:,} bytes", status=413)
    try:
        return json.loads(body)
    except ValueError as error:
        raise RequestError(f"the request is not JSON: {error}") from error


def _add_errors(app: FastAPI) -> None:
    def answer(error: Exception) -> JSONResponse:
        shaped = _error_of(error)
        return JSONResponse(shaped.body(), status_code=shaped.status)

    async def handle(_: Request, error: Exception) -> Response:
        return answer(error)

    handler: Callable[[Request, Exception], Awaitable[Response]] = handle
    for kind in (RequestError, SftError, HTTPException, Exception):
        app.add_exception_handler(kind, handler)


def _error_of(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, SftError):
        return RequestError(f"{error.what} ({error.fix})", status=400 if error.exit_code == 2 else 500)
    if isinstance(error, HTTPException):
        return RequestError(str(error.detail), status=error.status_code)
    return RequestError(f"the server failed: {type(error).__name__}", status=500)
