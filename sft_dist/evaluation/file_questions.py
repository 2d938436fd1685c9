"""The rows of a file as questions: what comes before the last answer, and that answer to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft_dist.data import formats
from sft_dist.data.messages import Conversation, Message, Origin, Segments, TokenIds
from sft_dist.data.sources import read_rows
from sft_dist.errors import DataError, RowError
from sft_dist.evaluation.prompt import Prompter

# Stands where a row without an answer would have one, so that the readers of training data read it.
_NO_ANSWER = "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Question:
    """
    Args:
        shown: what was asked, as it is written into the output: ``messages`` or ``prompt``.
        prompt: its tokens.
        reference: the row's own answer; None: it has none.
    """

    shown: Mapping[str, Any]
    prompt: list[int]
    reference: str | None

    @property
    def question(self) -> str | None:
        """What the user said last."""
        said = [each["content"] for each in self.shown.get("messages", ()) if each["role"] == "user"]
        return said[-1] if said else self.shown.get("prompt")


def read_questions(path: str, prompter: Prompter, *, system: str | None) -> Iterator[Question]:
    """The questions of a file in any layout that the project trains on, with or without answers.

    Args:
        system: stands in front of the rows that have no system message of their own.

    Raises:
        DataError: a row cannot be read, or has nothing to answer.
        PromptRefused: the model's template cannot write one.
    """
    for row, origin in read_rows(path):
        answered, has_answer = _with_an_answer(row)
        layout = formats.recognise(answered, origin)
        parsed = formats.parse(answered, origin, layout)
        if isinstance(parsed, Conversation):
            yield _of_conversation(parsed, prompter, system=system, has_answer=has_answer)
        elif isinstance(parsed, Segments):
            yield _of_segments(parsed, prompter, origin)
        else:
            yield _of_tokens(parsed, prompter)


def _with_an_answer(row: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The row, with an answer where it has none, and whether it has one."""
    for turns_key, role_key, text_key, answerers in (
        ("messages", "role", "content", {"assistant"}),
        ("conversations", "role", "content", {"assistant"}),
        ("messages", "from", "value", formats.SHAREGPT_ANSWERERS),
        ("conversations", "from", "value", formats.SHAREGPT_ANSWERERS),
    ):
        turns = row.get(turns_key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and role_key in turns[-1]:
            if turns[-1][role_key] in answerers:
                return row, True
            answer = {role_key: "assistant", text_key: _NO_ANSWER}
            return {**row, turns_key: [*turns, answer]}, False
    for question, answer_key in (("instruction", "output"), ("prompt", "completion"), ("input", "output")):
        if question in row and answer_key not in row:
            is_list = isinstance(row[question], list)
            empty: Any = [{"role": "assistant", "content": _NO_ANSWER}] if is_list else _NO_ANSWER
            return {**row, answer_key: empty}, False
    return row, True


def _of_conversation(row: Conversation, prompter: Prompter, *, system: str | None, has_answer: bool) -> Question:
    last = max(index for index, message in enumerate(row.messages) if message.role == "assistant")
    asked = list(row.messages[:last])
    if system is not None and not any(message.role == "system" for message in asked):
        asked.insert(0, Message("system", system))
    if not asked:
        raise RowError(f"{row.origin}: nothing comes before the answer", fix="give the row a question, or remove it")
    reference = _text_of(row.messages[last]) if has_answer else None
    if prompter.chats:
        return Question({"messages": [_shown(m) for m in asked]}, prompter.chat(asked, row.tools), reference)
    # A model without turns goes on from what was written.
    text = "\n".join(message.content for message in asked)
    return Question({"prompt": text}, prompter.complete(text), reference)


def _of_segments(row: Segments, prompter: Prompter, origin: Origin) -> Question:
    if row.is_document:
        raise DataError(
            f"{origin}: a document has no prompt", fix='write rows with a prompt, such as {"prompt": "..."}'
        )
    last = max(index for index, segment in enumerate(row.segments) if segment.trained and segment.text)
    first = last
    while first > 0 and row.segments[first - 1].trained:
        first -= 1
    text = "".join(segment.text for segment in row.segments[:first])
    reference = "".join(segment.text for segment in row.segments[first : last + 1])
    return Question({"prompt": text}, prompter.complete(text), reference)


def _of_tokens(row: TokenIds, prompter: Prompter) -> Question:
    end = len(row.trained) - row.trained[::-1].index(True)
    start = end
    while start > 0 and row.trained[start - 1]:
        start -= 1
    ids, decode = list(row.input_ids), prompter.tokenizer.decode
    return Question({"prompt": decode(ids[:start])}, ids[:start], decode(ids[start:end], skip_special_tokens=True))


def _text_of(answer: Message) -> str:
    calls = [
        json.dumps({"name": c.name, "arguments": dict(c.arguments)}, ensure_ascii=False) for c in answer.tool_calls
    ]
    return "\n".join([answer.content, *calls] if answer.content else calls)


def _shown(message: Message) -> dict[str, Any]:
    shown: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": c.name, "arguments": json.dumps(dict(c.arguments), ensure_ascii=False)},
            }
            for c in message.tool_calls
        ]
    return shown
