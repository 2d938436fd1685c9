"""The row layouts in use. These are read into a ``Conversation``; ``literal_formats`` has those without a template.

==================  ================================================================================================
alpaca              ``instruction``, ``output``; optional ``input``, ``system``, ``history`` (pairs of texts)
sharegpt            ``conversations`` or ``messages`` of ``{"from", "value"}``; optional ``system``, ``tools``
messages            ``messages`` or ``conversations`` of OpenAI's ``{"role", "content", "tool_calls"}``; same options
prompt_completion   ``prompt``, ``completion``: two texts, or two lists of messages; only the completion is trained
input_output        ``input``, ``output``: two texts
==================  ================================================================================================

Keys that a layout does not know (ids, sources, scores) are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

from sft_dist.data.fields import MOST_SHOWN, Fields, kind, listed, shown, tool_call, tools
from sft_dist.data.literal_formats import read_segments, read_text, read_tokens
from sft_dist.data.messages import Conversation, Message, Origin, Role, Row, ToolCall, check

Layout = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "input_output", "segments", "text", "tokens"]

_SHAREGPT_NAMES: Mapping[Role | Literal["call"], tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bard", "bing", "claude", "bot", "ai", "chatbot"),
    "call": ("function_call", "function-call", "tool_call", "tool-call"),
    "tool": ("observation", "tool", "function", "function_response", "function-response", "tool_response",
             "tool-response", "tool_result", "function_result"),
}  # fmt: skip
# What a turn of the assistant is called.
SHAREGPT_ANSWERERS = frozenset((*_SHAREGPT_NAMES["assistant"], *_SHAREGPT_NAMES["call"]))
_SHAREGPT_ROLES = {name: role for role, names in _SHAREGPT_NAMES.items() for name in names}
# OpenAI renamed system to developer, and function to tool; the files of both times are around.
_OPENAI_ROLES: Mapping[str, Role] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}


def recognise(row: Mapping[str, Any], origin: Origin) -> Layout:
    """The layout that the row's keys show. Raises ``RowError`` with the keys seen when there is none."""
    for key in ("messages", "conversations"):
        turns = row.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            if "role" in turns[0]:
                return "messages"
            if "from" in turns[0]:
                return "sharegpt"
    if isinstance(row.get("segments"), list):
        return "segments"
    if "input_ids" in row:
        return "tokens"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "input" in row and "output" in row:
        return "input_output"
    if "text" in row:
        return "text"
    raise Fields(row, origin).error(
        f"no known layout has these keys: {_describe_keys(row)}",
        fix=f"rename the keys to those of one of {', '.join(LAYOUTS)} (docs/data.md has a row of each), or say what "
        "they are by columns of the source, e.g. columns: {prompt: question, completion: answer}",
    )


def _describe_keys(row: Mapping[str, Any]) -> str:
    """The row's keys, and those of the first turn of a list of turns, which decide between two layouts."""
    parts = []
    for key, value in islice(row.items(), MOST_SHOWN):
        if key not in ("messages", "conversations") or not isinstance(value, list):
            parts.append(shown(key))
        elif not value:
            parts.append(f"{key} (empty)")
        else:
            parts.append(f"{key} of {listed(value[0]) if isinstance(value[0], dict) else kind(value[0])}")
    return ", ".join(parts + ["..."] * (len(row) > MOST_SHOWN)) or "none"


def parse(row: Mapping[str, Any], origin: Origin, layout: str) -> Row:
    """Read one row by the rules of ``layout``.

    Raises:
        RowError: naming file, row and key, for a missing or wrongly typed key, an unknown role or no answer.
    """
    read = LAYOUTS[layout](Fields(row, origin))
    return check(read) if isinstance(read, Conversation) else read


def _alpaca(row: Fields) -> Conversation:
    messages = _system(row)
    for index, pair in enumerate(row.items("history")):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise row.error(
                f"history[{index}] is not a pair of texts", fix="write history as [[question, answer], ...]"
            )
        where = f"history[{index}]"
        messages += [Message("user", row.whole(pair[0], where)), Message("assistant", row.whole(pair[1], where))]
    question = "\n".join(part for part in (row.text("instruction"), row.optional_text("input")) if part)
    if not question.strip():
        raise row.error("instruction and input are both empty", fix="write the instruction, or remove the row")
    messages += [Message("user", question), Message("assistant", row.text("output"))]
    return Conversation(tuple(messages), (), row.origin)


def _input_output(row: Fields) -> Conversation:
    messages = [*_system(row), Message("user", row.text("input")), Message("assistant", row.text("output"))]
    return Conversation(tuple(messages), (), row.origin)


def _prompt_completion(row: Fields) -> Conversation:
    prompt, completion = row.values.get("prompt"), row.values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        # The prompt's own assistant turns are given, not asked for: they stay context.
        context = [replace(message, trained=False) for message in _openai_turns(row, "prompt")]
        answer = _openai_turns(row, "completion")
        return Conversation((*_system(row), *context, *answer), tools(row), row.origin)
    if isinstance(prompt, list) or isinstance(completion, list):
        raise row.error(
            f"prompt is {kind(prompt)} and completion is {kind(completion)}",
            fix="write both as texts, or both as lists of messages",
        )
    messages = [*_system(row), Message("user", row.text("prompt")), Message("assistant", row.text("completion"))]
    return Conversation(tuple(messages), (), row.origin)


def _sharegpt(row: Fields) -> Conversation:
    messages = _system(row)
    for turn in row.objects(_turns_key(row)):
        role = turn.choice("from", _SHAREGPT_ROLES)
        is_trained = _is_trained(turn, "assistant" if role == "call" else role)
        if role == "call":
            _add_calls(messages, _calls(turn), turn, is_trained)
        elif role == "tool":
            messages.append(Message("tool", _tool_result(turn), name=turn.optional_text("name")))
        else:
            messages.append(Message(role, turn.text("value"), trained=is_trained))
    return Conversation(tuple(messages), tools(row), row.origin)


def _calls(turn: Fields) -> tuple[ToolCall, ...]:
    """A ``function_call``: JSON of one call or of a list of calls made at once."""
    value = turn.json_value("value")
    listed = value if isinstance(value, list) else [value]
    if not listed or not all(isinstance(call, dict) for call in listed):
        raise turn.error(
            f"{turn.path('value')} holds no function call",
            fix='write a call as {"name": ..., "arguments": {...}}, or a list of them',
        )
    return tuple(tool_call(call) for call in Fields({"value": listed}, turn.origin, turn.where).objects("value"))


def _add_calls(messages: list[Message], calls: tuple[ToolCall, ...], turn: Fields, is_trained: bool) -> None:
    """Append calls; ShareGPT writes one assistant turn that speaks and calls, or calls twice, as several entries."""
    if not messages or messages[-1].role != "assistant":
        messages.append(Message("assistant", "", tool_calls=calls, trained=is_trained))
    elif messages[-1].trained == is_trained:
        messages[-1] = replace(messages[-1], tool_calls=messages[-1].tool_calls + calls)
    else:
        raise turn.error(
            f"{turn.where} and the entry before it are one turn of the assistant, of which only one is to be trained",
            fix="give both the same weight",
        )


def _is_trained(turn: Fields, role: Role) -> bool:
    """What ``weight`` (OpenAI: 0 or 1) and ``train`` (true or false) say of a turn; true where neither is there."""
    weight, train = turn.values.get("weight"), turn.flag("train")
    if weight not in (None, 0, 1):
        raise turn.error(f"{turn.path('weight')} is {shown(weight)}", fix="use 0 (context only) or 1 (trained on)")
    if weight is not None and train is not None and bool(weight) != train:
        raise turn.error(f"{turn.where} has weight {shown(weight)} and train {train}", fix="keep one of the two")
    if train and role != "assistant":
        raise turn.error(
            f"{turn.path('train')} is true in a turn of role {role}; only the assistant's turns are trained",
            fix="remove it, or write the row with format segments, of which any can be trained",
        )
    return train is not False and weight != 0


def _tool_result(turn: Fields) -> str:
    """What a tool gave back; an object or a list is kept as its JSON."""
    value = turn.values.get("value")
    return turn.as_json(value, "value") if isinstance(value, dict | list) else turn.text("value")


def _messages(row: Fields) -> Conversation:
    return Conversation((*_system(row), *_openai_turns(row, _turns_key(row))), tools(row), row.origin)


def _openai_turns(row: Fields, key: str) -> list[Message]:
    return [_openai_message(turn) for turn in row.objects(key)]


def _openai_message(turn: Fields) -> Message:
    role = turn.choice("role", _OPENAI_ROLES)
    calls = tuple(_openai_call(call) for call in turn.objects("tool_calls"))
    calls += tuple(map(tool_call, turn.optional_object("function_call")))  # the form before tool_calls
    if calls and role != "assistant":
        raise turn.error(f"{turn.where} has tool calls in role {role}", fix="tool calls belong to the role assistant")
    return Message(
        role,
        _openai_content(turn, may_be_null=role == "assistant"),
        tool_calls=calls,
        name=turn.optional_text("name"),
        tool_call_id=turn.optional_text("tool_call_id"),
        reasoning=turn.optional_text("reasoning_content"),
        trained=_is_trained(turn, role),
    )


def _openai_call(call: Fields) -> ToolCall:
    id = call.optional_text("id")
    function = call.values.get("function")
    if isinstance(function, dict):
        return tool_call(Fields(function, call.origin, call.path("function")), id=id)
    return tool_call(call, id=id)


def _openai_content(turn: Fields, *, may_be_null: bool) -> str:
    content = turn.values.get("content")
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        return turn.text("content")
    texts = []
    for part in turn.objects("content"):
        if part.values.get("type", "text") != "text":
            raise turn.error(
                f"{part.path('type')} is '{shown(part.values['type'])}'; only text is trained on",
                fix="remove the rows with images, sound or files",
            )
        texts.append(part.text("text"))
    return "".join(texts)


def _turns_key(row: Fields) -> str:
    present = [key for key in ("messages", "conversations") if key in row.values]
    if not present:
        raise row.error(
            f"neither messages nor conversations is there (keys: {listed(row.values)})",
            fix="add the list of turns, or set `format` of the source",
        )
    return next((key for key in present if row.values[key]), present[0])


def _system(row: Fields) -> list[Message]:
    """The row's own system prompt, as a list of no or one message."""
    system = row.optional_text("system")
    return [Message("system", system)] if system else []


LAYOUTS: dict[str, Callable[[Fields], Row]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "input_output": _input_output,
    "segments": read_segments,
    "text": read_text,
    "tokens": read_tokens,
}
