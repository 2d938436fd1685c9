"""The page and what it asks for, over HTTP on this machine alone.

Only a page with the key of this start gets an answer, and only under this machine's own name, so that neither another
user's program nor a page of another site can read the answers or vote.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

from sft_dist.errors import ConfigError
from sft_dist.pages.answer import visible
from sft_dist.pages.page import environment, only_these, template, text_of
from sft_dist.review.pairs import Comparison
from sft_dist.review.votes import CHOICES, Votes

LOOPBACK = "127.0.0.1"
MOST_BYTES = 10_000


class ReviewServer:
    """Use as a context; ``serve`` answers until it is interrupted.

    Args:
        port: 0: any that is free.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, comparison: Comparison, votes: Votes, *, seed: int, port: int) -> None:
        self._comparison, self._votes, self._seed = comparison, votes, seed
        self._by_id = {pair.id: pair for pair in comparison.pairs}
        self.key, self._lock = secrets.token_urlsafe(16), Lock()
        try:
            self._server = ThreadingHTTPServer((LOOPBACK, port), _handler(self))
        except OSError as error:
            raise ConfigError(
                f"port {port} of {LOOPBACK} cannot be used ({error.strerror})", fix="take another --port, or 0"
            ) from error
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.port}/?key={self.key}"

    def serve(self) -> None:
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def page(self) -> str:
        script = text_of("sft_dist.review", "review.js")
        made = template("sft_dist.review", "review.html.jinja", environment())
        policy = only_these([script]) + "; connect-src 'self'"
        return made.render(key=self.key, script=script, policy=policy, count=len(self._comparison.pairs))

    def state(self) -> dict[str, Any]:
        """All pairs as they stand on the page; not whose answers they are."""
        pairs = []
        for pair in self._comparison.pairs:
            left = 1 if pair.is_swapped(self._seed) else 0
            pairs.append(
                {
                    "id": pair.id, "prompt": pair.question or pair.prompt, "reference": pair.reference,
                    "left": visible(pair.answers[left]), "right": visible(pair.answers[1 - left]),
                    "choice": self._votes.by_pair.get(pair.id),
                }
            )  # fmt: skip
        return {"pairs": pairs, "equal": self._comparison.num_equal}

    def choose(self, asked: Any) -> dict[str, Any] | None:
        """None: it is no choice."""
        if not isinstance(asked, dict):
            return None
        pair, choice = self._by_id.get(str(asked.get("pair"))), asked.get("choice")
        if pair is None or not (choice is None or choice in CHOICES):
            return None
        with self._lock:
            self._votes.choose(pair, choice)
        return {"saved": True}

    def result(self) -> dict[str, Any]:
        """Whose answers were better."""
        tally = self._votes.tally(self._comparison)
        return {
            "names": list(self._comparison.names), "first": tally.first, "second": tally.second, "tie": tally.tie,
            "bad": tally.bad, "open": tally.open, "share": tally.share(), "chance": tally.chance(),
        }  # fmt: skip


def _handler(review: ReviewServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            if asked.path == "/" and parse_qs(asked.query).get("key") == [review.key] and self._is_own_name():
                self._answer(HTTPStatus.OK, review.page(), "text/html")
            elif self._may():
                found = {"/state": review.state, "/result": review.result}.get(asked.path)
                self._json(found)
            else:
                self._answer(HTTPStatus.FORBIDDEN, "open the address that the program has printed\n", "text/plain")

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if not self._may() or self.path != "/choose" or length > MOST_BYTES:
                self._answer(HTTPStatus.FORBIDDEN, "", "text/plain")
                return
            try:
                asked = json.loads(self.rfile.read(length))
            except ValueError:
                asked = None
            try:
                self._json(lambda: review.choose(asked))
            except OSError as error:
                self._answer(HTTPStatus.INSUFFICIENT_STORAGE, str(error.strerror or error), "text/plain")

        def _is_own_name(self) -> bool:
            return self.headers.get("Host") in (f"{LOOPBACK}:{review.port}", f"localhost:{review.port}")

        def _may(self) -> bool:
            return self._is_own_name() and secrets.compare_digest(self.headers.get("X-Key") or "", review.key)

        def _json(self, make: Callable[[], dict[str, Any] | None] | None) -> None:
            found = None if make is None else make()
            if found is None:
                self._answer(HTTPStatus.BAD_REQUEST, "", "text/plain")
            else:
                self._answer(HTTPStatus.OK, json.dumps(found, ensure_ascii=False), "application/json")

        def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """A line for each key that is pressed would be of no use."""

    return Handler
