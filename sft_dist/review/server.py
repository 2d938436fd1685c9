"""The page and what it asks for, over HTTP on this machine alone.

Only a page with the key of this start gets an answer, and only under this machine's own name, so that neither another
user's program nor a page of another site can read the answers or vote.
"""

from __future__ import annotations

import json
from http import HTTPStatus
from threading import Lock
from typing import Any

from sft_dist.pages.answer import visible
from sft_dist.pages.local_server import FORBIDDEN, Answer, Asked, LocalServer, json_answer, refusal
from sft_dist.pages.page import environment, only_these, template, text_of
from sft_dist.review.pairs import Comparison
from sft_dist.review.votes import CHOICES, Votes


class ReviewServer:
    """``serve`` answers until ``close``.

    Args:
        port: 0: any that is free.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, comparison: Comparison, votes: Votes, *, seed: int, port: int) -> None:
        self._comparison, self._votes, self._seed = comparison, votes, seed
        self._by_id = {pair.id: pair for pair in comparison.pairs}
        self._lock = Lock()
        self._server = LocalServer(self._respond, port=port)
        self.key, self.port, self.address = self._server.key, self._server.port, self._server.address

    def serve(self) -> None:
        self._server.serve()

    def close(self) -> None:
        self._server.close()

    def _respond(self, asked: Asked) -> Answer:
        if asked.path == "/" and self._server.opens(asked):
            return self._page()
        if not self._server.has_key(asked):
            return FORBIDDEN
        match asked.method, asked.path:
            case "GET", "/state":
                return json_answer(self.state())
            case "GET", "/result":
                return json_answer(self.result())
            case "POST", "/choose":
                return self._chosen(asked.body)
        return refusal(HTTPStatus.NOT_FOUND)

    def _chosen(self, body: bytes) -> Answer:
        try:
            found = self.choose(json.loads(body))
        except ValueError:
            found = None
        except OSError as error:
            return refusal(HTTPStatus.INSUFFICIENT_STORAGE, str(error.strerror or error))
        return refusal(HTTPStatus.BAD_REQUEST) if found is None else json_answer(found)

    def _page(self) -> Answer:
        script = text_of("sft_dist.review", "review.js")
        made = template("sft_dist.review", "review.html.jinja", environment())
        policy = only_these([script], own_server=True)
        page = made.render(key=self.key, script=script, count=len(self._comparison.pairs))
        return Answer(page, policy=policy)

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
