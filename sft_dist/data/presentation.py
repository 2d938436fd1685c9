"""How a conversation is put to a template, so that nothing in it is lost.

Most templates know fewer things than a conversation can hold: a plain ChatML template prints ``content`` and drops tool
calls and tools without a word. What a template knows is found once, by rendering small conversations with made-up words
in them and looking for the words; every row is then presented in the same way:

- tool calls that the template does not print become lines of JSON, ``{"name": ..., "arguments": {...}}``, at the end of
  the assistant's content;
- tools that it does not print become lines of JSON in the system message (in the first user message where the template
  has no system role);
- tool results whose role it does not print become user turns, each result inside ``<tool_response>`` tags.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from sft_dist.data.jinja_template import JinjaTemplate, TemplateFailure
from sft_dist.data.messages import Message, ToolCall

ChatMessage = dict[str, Any]
Tools = Sequence[Mapping[str, Any]] | None

_TOOLS_HEADER = (
    'You can call the tools below. To call one, answer with a line of JSON: {"name": ..., "arguments": {...}}'
)


@dataclass(frozen=True)
class Presentation:
    """What a template prints by itself.

    Args:
        arguments: how it takes a call's arguments: as an object, as JSON text, or None: it prints no calls.
        tools: whether it prints the ``tools`` it is given.
        tool_role: whether it prints messages of role ``tool``.
        system_role: whether it prints messages of role ``system``.
    """

    arguments: Literal["object", "text"] | None
    tools: bool
    tool_role: bool
    system_role: bool

    def rewrites(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether ``present`` writes tools, calls or results of this conversation into the text of messages."""
        return bool(
            (tools and not self.tools)
            or (self.arguments is None and any(message.tool_calls for message in messages))
            or (not self.tool_role and any(message.role == "tool" for message in messages))
        )

    def present(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[ChatMessage], Tools]:
        """``messages`` and ``tools`` in the form that the template reads.

        Every assistant turn stays one assistant turn; only tool results may be joined into one user turn.
        """
        presented: list[ChatMessage] = []
        previous_role = ""
        for message in _with_call_ids(messages):
            if message.role == "tool" and not self.tool_role:
                result = f"<tool_response>\n{message.content}\n</tool_response>"
                if previous_role == "tool":  # the results of calls made at once; templates want the roles to alternate
                    presented[-1]["content"] += f"\n{result}"
                else:
                    presented.append({"role": "user", "content": result})
            else:
                presented.append(self._message(message))
            previous_role = message.role
        if tools and not self.tools:
            self._add_tools(presented, tools)
        return presented, tools if tools and self.tools else None

    def _message(self, message: Message) -> ChatMessage:
        presented: ChatMessage = {"role": message.role, "content": message.content}
        if message.tool_calls and self.arguments is None:
            lines = [
                json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
                for call in message.tool_calls
            ]
            presented["content"] = "\n".join([message.content, *lines] if message.content else lines)
        elif message.tool_calls:
            presented["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if message.reasoning:
            # transformers offers a message's reasoning under both names; templates read one or the other.
            presented |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
        if message.name is not None:
            presented["name"] = message.name
        if message.tool_call_id is not None:
            presented["tool_call_id"] = message.tool_call_id
        return presented

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: object = dict(call.arguments)
        if self.arguments == "text":
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}

    def _add_tools(self, presented: list[ChatMessage], tools: Sequence[Mapping[str, Any]]) -> None:
        text = "\n".join([_TOOLS_HEADER, *(json.dumps(tool, ensure_ascii=False) for tool in tools)])
        role = "system" if self.system_role else "user"
        first = next((message for message in presented if message["role"] == role), None)
        if first is None:
            presented.insert(0, {"role": role, "content": text})
        elif role == "system":
            first["content"] = f"{first['content']}\n\n{text}"
        else:
            first["content"] = f"{text}\n\n{first['content']}"


def _with_call_ids(messages: Sequence[Message]) -> Sequence[Message]:
    """Number the calls that have no id, and give each result the id of the call it answers, in order.

    The ids have nine characters: Mistral's templates refuse any other length.
    """
    if not any(message.tool_calls for message in messages):
        return messages
    numbered: list[Message] = []
    pending: list[str] = []
    count = 0
    for message in messages:
        if message.tool_calls:
            calls = tuple(replace(c, id=c.id or f"call{count + k:05d}") for k, c in enumerate(message.tool_calls))
            count += len(calls)
            pending = [call.id for call in calls if call.id]
            message = replace(message, tool_calls=calls)
        elif message.role == "tool":
            answered = message.tool_call_id or (pending[0] if pending else None)
            pending = [id for id in pending if id != answered]
            message = replace(message, tool_call_id=answered)
        numbered.append(message)
    return numbered


# Made-up words of a probe. Letters only: no template escapes or trims them.
_WORDS = {word: f"{word}Qxzvj" for word in ("system", "tool", "function", "key", "value", "result")}
_TOOL = {
    "type": "function",
    "function": {
        "name": _WORDS["tool"],
        "description": "probe",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
_QUESTION, _ANSWER = Message("user", "question"), Message("assistant", "answer")
_CALL = Message("assistant", "", tool_calls=(ToolCall(_WORDS["function"], {_WORDS["key"]: _WORDS["value"]}),))


def find_presentation(template: JinjaTemplate) -> Presentation:
    """Find out what ``template`` prints by itself; what makes it fail counts as not printed."""
    known = Presentation(arguments=None, tools=True, tool_role=True, system_role=True)

    def prints(presentation: Presentation, words: Sequence[str], *messages: Message, tools: bool = False) -> bool:
        presented, given = presentation.present(messages, [_TOOL] if tools else [])
        try:
            text = template.render(presented, given)
        except TemplateFailure:
            return False
        return all(word in text for word in words) and f"'{_WORDS['key']}'" not in text

    known = replace(
        known,
        system_role=prints(known, [_WORDS["system"]], Message("system", _WORDS["system"]), _QUESTION, _ANSWER),
        tools=prints(known, [_WORDS["tool"]], _QUESTION, _ANSWER, tools=True),
    )
    # A template that prints an object as Python does ('key': ...) wants JSON text, and so does one that fails on it.
    forms: tuple[Literal["object", "text"], ...] = ("object", "text")
    call_words = [_WORDS["function"], _WORDS["key"], _WORDS["value"]]
    for form in forms:
        if prints(replace(known, arguments=form), call_words, _QUESTION, _CALL):
            known = replace(known, arguments=form)
            break
    conversation = (_QUESTION, _CALL, Message("tool", _WORDS["result"], name=_WORDS["function"]), _ANSWER)
    return replace(known, tool_role=prints(known, [_WORDS["result"]], *conversation))
