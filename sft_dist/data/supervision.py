"""What of a conversation is trained, as ``data.train_on`` and its neighbours say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import xxhash

from sft_dist.data.jinja_template import Span
from sft_dist.data.messages import Conversation, Message

PLACEHOLDER = "{prompt}"

_REASONING = re.compile(r"<think(?:ing)?>(.*?)</think(?:ing)?>", re.DOTALL)
_CLOSING_TAG = re.compile(r"\s*</think(?:ing)?>\s*")


@dataclass(frozen=True)
class Supervision:
    """Which tokens of a conversation are trained.

    Args:
        train_on: the assistant's answers, the last of them, or all text but the answers that are context only.
        reasoning: False: not the reasoning before an answer.
        tool_calls: False: not the turns that call tools.
    """

    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    reasoning: bool = True
    tool_calls: bool = True

    def choose(self, conversation: Conversation) -> Conversation:
        """The conversation with ``trained`` left on the turns that are to be."""
        messages = conversation.messages
        trained = {
            index
            for index, message in enumerate(messages)
            if message.role == "assistant" and message.trained and (self.tool_calls or not message.tool_calls)
        }
        if self.train_on == "last_assistant":
            trained &= {max(trained, default=-1)}
        if all(message.trained == (index in trained) for index, message in enumerate(messages) if _answers(message)):
            return conversation
        chosen = (
            replace(message, trained=index in trained) if _answers(message) else message
            for index, message in enumerate(messages)
        )
        return replace(conversation, messages=tuple(chosen))


DEFAULT = Supervision()


def _answers(message: Message) -> bool:
    return message.role == "assistant"


def complement(spans: Sequence[Span], length: int) -> list[Span]:
    """What lies between ``spans``, which are in order, in a text of ``length`` characters."""
    borders = [0, *(place for span in spans for place in span), length]
    return [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end]


def after_reasoning(span: Span, text: str, message: Message) -> Span:
    """The part of an answer's span that follows its reasoning and the tag that closes it."""
    start, end = span
    inline = _REASONING.search(message.content)
    reasoning = (message.reasoning or (inline.group(1) if inline else "")).strip()
    place = text.find(reasoning, start, end) if reasoning else -1
    if place < 0:  # templates leave out the reasoning of earlier turns
        return span
    place += len(reasoning)
    closing = _CLOSING_TAG.match(text, place, end)
    return (closing.end() if closing else place), end


def vary_prompt(conversation: Conversation, templates: Sequence[str], seed: int) -> Conversation:
    """Puts the first user message into one of ``templates``, drawn by the seed, the row's place and its text."""
    for index, message in enumerate(conversation.messages):
        if message.role == "user":
            drawn = xxhash.xxh3_64_intdigest(f"{seed}\0{conversation.origin.row}\0{message.content}".encode())
            text = templates[drawn % len(templates)].replace(PLACEHOLDER, message.content)
            varied = replace(message, content=text)
            return replace(
                conversation, messages=(*conversation.messages[:index], varied, *conversation.messages[index + 1 :])
            )
    return conversation
