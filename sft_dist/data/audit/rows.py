"""A row as an audit sees it: its turns, its question, its answer.

Everything that a check wants to know about the text of a row is taken from a ``RowText``, so that a new kind of row
needs a change here only.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from sft_dist.data.audit.language import language
from sft_dist.data.messages import Conversation, Message, Origin

if TYPE_CHECKING:
    from sft_dist.data.chat_template import TokenizedRow


class Row(Protocol):
    """Any kind of row: it knows where it stands."""

    @property
    def origin(self) -> Origin: ...


@runtime_checkable
class TextRow(Protocol):
    """Text that is trained as it is."""

    @property
    def text(self) -> str: ...


class Segment(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def trained(self) -> bool: ...


@runtime_checkable
class SegmentRow(Protocol):
    """Text in pieces, trained and not trained."""

    @property
    def segments(self) -> Sequence[Segment]: ...


@runtime_checkable
class TokenRow(Protocol):
    """Token ids alone, which have no text."""

    @property
    def input_ids(self) -> Sequence[int]: ...


@dataclass(frozen=True, slots=True)
class AuditedRow:
    """A row, the source it is from, and what became of it.

    Args:
        source: name of the source, as the reports show it.
        tokens: before anything is cut to ``max_seq_len``; None where the row was not tokenised.
    """

    source: str
    row: Row
    tokens: TokenizedRow | None


@dataclass(frozen=True)
class RowText:
    """The texts of a row.

    Args:
        context: everything before the last answer that is trained, roles included.
        question: of ``context`` what users and tools say. System prompts and tools are left out: rows share them.
        last_question: the user's turn before the last answer.
        answer: the last answer that is trained, tool calls as JSON.
        answers: every answer that is trained.
        others: the texts of all other turns.
        roles: of all turns; empty for a row without messages.
    """

    context: str
    question: str
    last_question: str
    answer: str
    answers: tuple[str, ...]
    others: tuple[str, ...]
    roles: tuple[str, ...]

    @cached_property
    def whole(self) -> str:
        """The row in one text, for comparisons with other rows."""
        return "\x00".join((self.context, *self.answers, self.answer))

    @property
    def has_text(self) -> bool:
        return any(part.strip() for part in (self.question, *self.answers))

    @cached_property
    def plain_question(self) -> str:
        return normalised(self.question)

    @cached_property
    def plain_answer(self) -> str:
        return normalised(self.answer)

    @cached_property
    def plain_content(self) -> str:
        """What users, tools and the assistant say, normalised, without what rows share."""
        earlier = [normalised(answer) for answer in self.answers[:-1]]
        return " ".join(part for part in (self.plain_question, *earlier, self.plain_answer) if part)

    @cached_property
    def languages(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """``language`` of the last question and of the last answer."""
        return language(self.last_question), language(self.answer)

    @cached_property
    def key(self) -> str:
        """What a held-out row is recognised by, normalised: its prompt, or its text where it has none."""
        return self.plain_question or self.plain_answer


def normalised(text: str) -> str:
    """NFKC, case-folded, every run of white space one space: what is left is what people call the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_and_answer(row: Row) -> tuple[str, str]:
    """What is asked and what is answered; ("", text) for text that is trained whole."""
    text = row_text(row)
    return text.question, text.answer


def row_text(row: Row) -> RowText:
    """The texts of a row of any kind."""
    match row:
        case Conversation():
            return _conversation_text(row)
        case SegmentRow():
            return _segments_text(row.segments)
        case TextRow():
            return RowText("", "", "", row.text, (row.text,), (), ())
        case TokenRow():
            return RowText("", "", "", "", (), (), ())
    raise TypeError(f"{type(row).__name__} is no kind of row")


def _segments_text(segments: Sequence[Segment]) -> RowText:
    """What comes before the first trained piece is the question, the rest the answer."""
    first = next((number for number, segment in enumerate(segments) if segment.trained), len(segments))
    question = "".join(segment.text for segment in segments[:first])
    answer = "".join(segment.text for segment in segments[first:])
    return RowText(question, question, question, answer, (answer,), (question,) if question else (), ())


def _conversation_text(conversation: Conversation) -> RowText:
    messages = conversation.messages
    trained = [index for index, message in enumerate(messages) if message.role == "assistant" and message.trained]
    last = trained[-1] if trained else len(messages)
    before = messages[:last]
    asked = [message.content for message in before if message.role in ("user", "tool")]
    users = [message.content for message in before if message.role == "user"]
    tools = json.dumps(conversation.tools, ensure_ascii=False, default=dict) if conversation.tools else ""
    return RowText(
        context="\x00".join([tools, *(f"{message.role}\x00{message_text(message)}" for message in before)]),
        question="\n".join(asked),
        last_question=users[-1] if users else "",
        answer=message_text(messages[last]) if trained else "",
        answers=tuple(message_text(messages[index]) for index in trained),
        others=tuple(message.content for index, message in enumerate(messages) if index not in trained),
        roles=tuple(message.role for message in messages),
    )


def message_text(message: Message) -> str:
    """What a turn says: reasoning, content, and its calls as lines of JSON."""
    if message.reasoning is None and not message.tool_calls:
        return message.content
    calls = [
        json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
        for call in message.tool_calls
    ]
    return "\n".join(part for part in (message.reasoning, message.content, *calls) if part)


def shown(text: str, *, around: int = 0, characters: int = 120) -> str:
    """A piece of ``text`` on one line, from a little before character ``around`` on."""
    start = max(0, around - characters // 3)
    piece = " ".join(text[start : start + 2 * characters].split())
    head = "…" if start else ""
    if len(piece) > characters or start + 2 * characters < len(text):
        piece = piece[:characters] + "…"
    return head + piece
