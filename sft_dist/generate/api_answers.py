"""Answers in the form of the OpenAI API: whole, or as the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from sft_dist.generate.engine import Answer

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class Form:
    """What the objects of one answer share.

    Args:
        model: what the API calls it.
        is_chat: of /v1/chat/completions; else of /v1/completions.
        includes_usage: a stream ends with the numbers of tokens.
    """

    model: str
    is_chat: bool
    includes_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The answer at once."""
        said: dict[str, Any] = {"text": answer.text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": _reason(answer)}
        return {**self._head(is_chunk=False), "choices": [choice], "usage": usage(answer)}

    def begin(self) -> list[str]:
        """Events before the first text: of a chat, who speaks."""
        return [self._chunk({"role": "assistant", "content": "", "refusal": None}, None)] if self.is_chat else []

    def piece(self, text: str) -> str:
        """The event of one piece of text."""
        return self._chunk({"content": text}, None) if self.is_chat else self._text(text, None)

    def end(self, answer: Answer) -> list[str]:
        """Events behind the last text."""
        reason = _reason(answer)
        events = [self._chunk({}, reason) if self.is_chat else self._text("", reason)]
        if self.includes_usage:
            events.append(event({**self._head(is_chunk=True), "choices": [], "usage": usage(answer)}))
        return [*events, DONE]

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> str:
        return self._choice({"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason})

    def _text(self, text: str, reason: str | None) -> str:
        return self._choice({"index": 0, "text": text, "logprobs": None, "finish_reason": reason})

    def _choice(self, choice: dict[str, Any]) -> str:
        last: dict[str, Any] = {"usage": None} if self.includes_usage else {}
        return event({**self._head(is_chunk=True), "choices": [choice], **last})

    def _head(self, *, is_chunk: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {"id": f"{prefix}-{self.number}", "object": kind, "created": self.created, "model": self.model}


def event(value: dict[str, Any]) -> str:
    """One event of a stream (SSE)."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def usage(answer: Answer) -> dict[str, int]:
    return {
        "prompt_tokens": answer.num_prompt_tokens,
        "completion_tokens": answer.num_tokens,
        "total_tokens": answer.num_prompt_tokens + answer.num_tokens,
    }


def _reason(answer: Answer) -> str:
    return "length" if answer.finish_reason == "length" else "stop"
