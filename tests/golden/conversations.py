"""What each family of chat templates is asked to write."""

from __future__ import annotations

from sft_dist.data.messages import Conversation, Message, Origin, ToolCall

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "天気を調べる",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _user(text: str) -> Message:
    return Message("user", text)


def _answer(text: str, *, reasoning: str | None = None, trained: bool = True) -> Message:
    return Message("assistant", text, reasoning=reasoning, trained=trained)


def _calls(*cities: str, text: str = "") -> Message:
    return Message("assistant", text, tool_calls=tuple(ToolCall("weather", {"city": city}) for city in cities))


def _result(text: str) -> Message:
    return Message("tool", text, name="weather")


_MESSAGES: dict[str, list[Message]] = {
    "single": [_user("Hi"), _answer("Hello there.")],
    "multi": [
        _user("Hi"), _answer("Hello there."), _user("And again?"), _answer("Hello again."), _user("Bye"), _answer("Bye"),
    ],
    "system": [Message("system", "Be brief."), _user("Hi"), _answer("Hello there.")],
    "tools": [
        _user("天気は？"), _calls("東京"), _result('{"sky": "晴れ"}'), _answer("晴れです。"), _user("Thanks"), _answer("Sunny."),
    ],
    "parallel_tools": [
        _user("Both?"), _calls("東京", "Rome", text="Let me look."), _result("晴れ"), _result("rain"), _answer("Not alike."),
    ],
    "reasoning": [
        _user("Hi"), _answer("Hello", reasoning="They greet."), _user("More"), _answer("World", reasoning="So I go on."),
    ],
    "think_tags": [
        _user("Hi"), _answer("<think>\nThey greet.\n</think>\n\nHello"),
        _user("More"), _answer("<think>\nSo I go on.\n</think>\n\nWorld"),
    ],
    "untrained": [
        _user("Hi"), _answer("Not this.", trained=False), _user("Again"), _answer("But this."), _user("Cut off"),
    ],
    "emoji": [_user("鬱？"), _answer("🙂鬱"), _user("🙂"), _answer("👍")],
    "japanese": [_user("東京の天気は🙂？"), _answer("晴れです☀️。家族👨‍👩‍👧で、こんにちは。")],
    "whitespace": [
        _user("  code?\n"), _answer("\n\n  if x:\n    return 1  \n"), _user("more\n"), _answer(" Hello \n\n"),
    ],
}  # fmt: skip

CONVERSATIONS = {
    name: Conversation(
        tuple(messages), (_WEATHER,) if name in ("tools", "parallel_tools") else (), Origin("rows.jsonl", 1)
    )
    for name, messages in _MESSAGES.items()
}
