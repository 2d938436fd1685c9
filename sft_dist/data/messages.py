"""A row in one of three shapes, whatever file it came from.

A ``Conversation`` goes through the chat template; ``Segments`` and ``TokenIds`` are taken literally. Every reader of
``formats`` ends in one of them; everything after it (template, mask, packs, audit) knows no other form. ``check`` holds
the rules that no conversation may break, so that they are written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sft_dist.errors import RowError

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Origin:
    """Where a row stands. ``row`` counts from 1: the line of a JSONL file, or the element of a JSON array."""

    path: str
    row: int
    is_line: bool = True

    def __str__(self) -> str:
        return f"{self.path}:{self.row}" if self.is_line else f"{self.path} row {self.row}"


@dataclass(frozen=True)
class ToolCall:
    """A call that the assistant makes. ``arguments`` is an object, never its JSON text: templates expect it so."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True)
class Message:
    """One turn.

    Args:
        content: the text; "" for an assistant turn that only calls tools.
        tool_calls: of an assistant turn, in the order of the file.
        name: of the tool that answers (role tool), or of the speaker.
        tool_call_id: the call that a tool result answers, where the file says so.
        reasoning: an assistant's reasoning when the file keeps it apart from the answer.
        trained: False for an assistant turn that is context only (a prompt's own turns, OpenAI ``weight: 0``).
    """

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class Conversation:
    """One row. ``tools`` are in OpenAI form: ``{"type": "function", "function": {"name": ..., ...}}``."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    origin: Origin


@dataclass(frozen=True)
class Segment:
    """A piece of text, and whether the model is trained to produce it."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Segments:
    """One row of text that no template touches.

    Args:
        segments: the pieces, in order; nothing stands between them.
        is_document: raw text of its own, for continued pre-training: BOS and EOS go around it. Else nothing is added.
    """

    segments: tuple[Segment, ...]
    origin: Origin
    is_document: bool = False


@dataclass(frozen=True)
class TokenIds:
    """One row that was tokenised before.

    Args:
        input_ids: ids of the model's tokenizer.
        trained: for each whether the model is trained to produce it.
    """

    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    origin: Origin


Row = Conversation | Segments | TokenIds


def check(conversation: Conversation) -> Conversation:
    """Return ``conversation`` unchanged, or raise the ``RowError`` that says why it cannot be trained on."""
    origin, messages = conversation.origin, conversation.messages
    for index, message in enumerate(messages):
        place = f"{origin}: turn {index + 1} of {len(messages)}"
        if message.role == "assistant":
            _check_answer(message, messages[index + 1 :], place)
        elif message.role == "tool" and not _follows_a_call(messages, index):
            raise RowError(
                f"{place} is a tool result, but no tool call comes before it",
                fix="put the assistant's call before its result, or remove the result",
            )
    if not any(message.role == "assistant" and message.trained for message in messages):
        raise RowError(
            f"{origin}: there is no answer to train on (roles: {', '.join(m.role for m in messages) or 'none'})",
            fix="give the row an assistant turn with text or a tool call, or remove the row",
        )
    return conversation


def _check_answer(message: Message, following: tuple[Message, ...], place: str) -> None:
    if not message.tool_calls and not message.content.strip():
        raise RowError(
            f"{place}: the assistant's answer is empty",
            fix="give the turn some text or a tool call, or remove the row",
        )
    if message.tool_calls and following and following[0].role != "tool":
        raise RowError(
            f"{place} calls {message.tool_calls[-1].name}, but no result follows (role {following[0].role})",
            fix="put the tool's result after the call, or end the conversation with the call",
        )


def _follows_a_call(messages: tuple[Message, ...], index: int) -> bool:
    """Whether only tool results stand between the message at ``index`` and an assistant's call."""
    before = index - 1
    while before >= 0 and messages[before].role == "tool":
        before -= 1
    return before >= 0 and bool(messages[before].tool_calls)
