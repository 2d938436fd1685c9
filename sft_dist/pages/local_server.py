"""Pages of this machine, over HTTP: for the user who started the program, and for nobody else.

The server listens on the loopback address alone and answers only under its own name (a page of another site that
points its name here is refused). ``LocalServer.has_key`` says whether who asks knows the key of this start, which other
users of the machine and pages of other sites do not.
"""

from __future__ import annotations

import json
import secrets
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sft_dist.errors import ConfigError

LOOPBACK = "127.0.0.1"

# Of what a page sends.
MOST_BYTES = 100_000

# Of an answer that says nothing of its own: it may ask for nothing and be shown in no other page.
NOTHING_ELSE = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Asked:
    """What a browser asks for.

    Args:
        path: without the query. query: each name with its values, in their order.
        headers: by name in small letters. body: of a POST.
    """

    method: str
    path: str
    query: Mapping[str, list[str]] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def one(self, name: str, default: str = "") -> str:
        """The first value of a name in the query."""
        return self.query.get(name, [default])[0]


@dataclass(frozen=True)
class Answer:
    """
    Args:
        policy: the Content-Security-Policy of the page.
        headers: besides those that every answer has.
    """

    text: str
    kind: str = "text/html"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = NOTHING_ELSE
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(found: Any) -> Answer:
    return Answer(json.dumps(found, ensure_ascii=False, allow_nan=False), "application/json")


def refusal(status: HTTPStatus, text: str = "") -> Answer:
    return Answer(text, "text/plain", status)


FORBIDDEN = refusal(HTTPStatus.FORBIDDEN, "open the address that the program has printed\n")


class LocalServer:
    """``serve`` answers until ``close``.

    Args:
        respond: the answer to what is asked under this server's own name.
        port: 0: any that is free.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, respond: Callable[[Asked], Answer], *, port: int) -> None:
        self.key = secrets.token_urlsafe(16)
        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), _handler(self, respond))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {LOOPBACK} cannot be used ({error.strerror})", fix="take another --port, or 0"
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        # Cookies know no ports: those of two servers need two names.
        self._cookie = f"sft-dist-{self.port}"

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/?key={self.key}"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Ends ``serve``, which has to be running in another thread."""
        self._server.shutdown()
        self._server.server_close()

    @property
    def set_cookie(self) -> dict[str, str]:
        """The header with which a browser keeps the key, for this server alone and out of the reach of any script."""
        return {"Set-Cookie": f"{self._cookie}={self.key}; HttpOnly; SameSite=Strict; Path=/"}

    def has_key(self, asked: Asked) -> bool:
        """By the header that only a page of ours can send, or by the cookie.

        A cookie comes with what a page of another program on this machine sends too: what changes something has to
        come from a page of this server.
        """
        if self._is_key(asked.headers.get("x-key", "")):
            return True
        try:
            cookie = SimpleCookie(asked.headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        if cookie is None or not self._is_key(cookie.value):
            return False
        return asked.method == "GET" or asked.headers.get("origin") in [f"http://{name}" for name in self.names]

    def opens(self, asked: Asked) -> bool:
        """Whether it is the address that was printed."""
        return asked.method == "GET" and self._is_key(asked.one("key"))

    @property
    def names(self) -> tuple[str, str]:
        """Under which it answers: another name may be that of anybody's page."""
        return f"{LOOPBACK}:{self.port}", f"localhost:{self.port}"

    def _is_key(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.key.encode())


def _handler(server: LocalServer, respond: Callable[[Asked], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or "0"
            if not length.isdecimal() or int(length) > MOST_BYTES:
                self._send(refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "this is too long\n"))
                return
            self._answer(self.rfile.read(int(length)))

        def _answer(self, body: bytes) -> None:
            if self.headers.get("Host") not in server.names:
                self._send(FORBIDDEN)
                return
            address = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            query = parse_qs(address.query, keep_blank_values=True)
            try:
                answer = respond(Asked(self.command, address.path, query, headers, body))
            except Exception as error:
                # A defect of one page: it is told where the program was started, and the others go on.
                traceback.print_exception(error)
                answer = refusal(
                    HTTPStatus.INTERNAL_SERVER_ERROR, "this failed; the terminal of the program says why\n"
                )
            self._send(answer)

        def _send(self, answer: Answer) -> None:
            body = answer.text.encode()
            always = {
                "Content-Type": f"{answer.kind}; charset=utf-8",
                "Content-Length": str(len(body)),
                "Content-Security-Policy": answer.policy,
                "Cache-Control": "no-store",
                "Referrer-Policy": "same-origin",
                "X-Content-Type-Options": "nosniff",
            }
            with suppress(ConnectionError):  # a page that was left does not wait for its answer
                self.send_response(answer.status)
                for name, value in {**always, **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A line for each request would be of no use."""

    return Handler
