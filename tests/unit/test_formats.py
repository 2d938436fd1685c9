"""Every layout becomes the same conversation, and every fault of a row is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sft_dist.data.formats import parse, recognise
from sft_dist.data.messages import Conversation, Message, Origin, ToolCall
from sft_dist.errors import DataError

ORIGIN = Origin("rows.jsonl", 7)
CALL = ToolCall("weather", {"city": "京都"})


def read(row: dict[str, Any]) -> Conversation:
    return parse(row, ORIGIN, recognise(row, ORIGIN))


def shape(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Yes"}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]}),
        ("sharegpt", {"messages": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Yes"}]}),
        ("messages", {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}),
        ("messages", {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}),
        ("prompt_completion", {"prompt": "Hi", "completion": "Yes"}),
        ("input_output", {"input": "Hi", "output": "Yes", "id": 3}),
    ],
)
def test_layouts_are_recognised_and_mean_the_same(layout: str, row: dict[str, Any]) -> None:
    assert recognise(row, ORIGIN) == layout
    assert read(row) == Conversation((Message("user", "Hi"), Message("assistant", "Yes")), (), ORIGIN)


def test_alpaca_with_input_system_and_history() -> None:
    row = {"instruction": "訳して", "input": "犬", "output": "dog", "system": "Translate.", "history": [["猫", "cat"]]}
    assert shape(read(row)) == [
        ("system", "Translate."),
        ("user", "猫"),
        ("assistant", "cat"),
        ("user", "訳して\n犬"),
        ("assistant", "dog"),
    ]


def test_sharegpt_calls_join_the_turn_that_speaks_and_glaive_tools_are_wrapped() -> None:
    value = json.dumps({"name": "weather", "arguments": {"city": "京都"}})
    row = {
        "conversations": [
            {"from": "human", "value": "?"},
            {"from": "gpt", "value": "Let me look."},
            {"from": "function_call", "value": value},
            {"from": "function_call", "value": f"[{value}, {value}]"},
            {"from": "observation", "value": {"rain": True}},
            {"from": "gpt", "value": "Rain."},
        ],
        "tools": json.dumps([{"name": "weather", "parameters": {}}, {"type": "function", "function": {"name": "b"}}]),
    }
    conversation = read(row)
    assert conversation.messages[1] == Message("assistant", "Let me look.", tool_calls=(CALL, CALL, CALL))
    assert conversation.messages[2] == Message("tool", '{"rain": true}')
    assert conversation.tools == (
        {"type": "function", "function": {"name": "weather", "parameters": {}}},
        {"type": "function", "function": {"name": "b"}},
    )


@pytest.mark.parametrize("arguments", [{"city": "京都"}, '{"city": "京都"}'])
def test_openai_calls_null_content_parts_and_weight(arguments: object) -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "We"}, {"type": "text", "text": "ather?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
                ],
                "weight": 0,
            },
            {"role": "tool", "content": "rain", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Rain.", "weight": 1},
        ]
    }
    messages = read(row).messages
    assert [message.role for message in messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[1].content == "Weather?"
    assert messages[2].tool_calls == (ToolCall("weather", {"city": "京都"}, "c1"),)
    assert [message.trained for message in messages if message.role == "assistant"] == [False, True]
    assert messages[3].tool_call_id == "c1"


def test_answers_inside_a_prompt_of_messages_are_context() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"prompt": turns, "completion": [{"role": "assistant", "content": "d"}]}
    assert [message.trained for message in read(row).messages if message.role == "assistant"] == [False, True]


def turns(*pairs: tuple[str, object], **more: object) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs], **more}


ASK: tuple[str, object] = ("human", "Hi")


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        ({"sentence": "x", "id": 1}, "keys: sentence, id", "prompt_completion, input_output, segments, text, tokens"),
        ({"conversations": []}, "conversations (empty)", "rename the keys"),
        ({"instruction": "Hi", "output": 3}, "output is a number, not a string", "write output as a string"),
        ({"instruction": "Hi", "output": " \n"}, "turn 2 of 2: the assistant's answer is empty", "remove the row"),
        ({"instruction": "", "input": "", "output": "x"}, "instruction and input are both empty", "remove the row"),
        ({"instruction": "Hi", "output": "x", "history": [["a"]]}, "history[0] is not a pair", "[[question, answer]"),
        ({"instruction": "Hi", "output": "\ud83d"}, "output holds half a surrogate pair", "emoji"),
        ({"prompt": "Hi", "completion": []}, "prompt is a string and completion is a list", "both as texts"),
        (turns(ASK), "there is no answer to train on (roles: user)", "give the row an assistant turn"),
        (turns(ASK, ("asistant", "x")), "conversations[1].from: unknown role 'asistant'", "use assistant"),
        (turns(ASK, ("gpt", None)), "conversations[1].value is null", "as a string"),
        (turns(ASK, ("observation", "x"), ("gpt", "y")), "turn 2 of 3 is a tool result, but no", "before its result"),
        (turns(ASK, ("function_call", "{'name': 1}")), "conversations[1].value is text, but not JSON", "double quotes"),
        (turns(ASK, ("function_call", "3")), "conversations[1].value holds no function call", '{"name": ...'),
        (turns(ASK, ("function_call", '{"arguments": {}}')), "conversations[1].value[0].name is missing", "name"),
        (turns(ASK, ("function_call", '{"name": "f", "arguments": [1]}')), "arguments is a list", "an object"),
        (turns(ASK, ("function_call", '{"name": "f"}'), ASK), "calls f, but no result follows (role user)", "after"),
        (turns(ASK, ("gpt", "x"), tools="{"), "tools is text, but not JSON", "double quotes"),
        (turns(ASK, ("gpt", "x"), tools=[{"parameters": {}}]), "tools[0] names no function", '"name"'),
        ({"messages": [{"role": "user", "content": "a"}, 3]}, "messages[1] is a number, not an object", "object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type is 'image_url'; only text",
            "images",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null", "as a string"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "messages[0].weight is 2", "use 0"),
    ],
)
def test_faults_name_file_row_key_and_fix(row: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(DataError) as raised:
        read(row)
    assert raised.value.what.startswith("rows.jsonl:7: ")
    assert what in raised.value.what
    assert fix in raised.value.fix
    assert "\n" not in raised.value.what + raised.value.fix


def test_a_given_layout_is_held_to() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:7: instruction is missing \(keys: prompt, completion\)"):
        parse({"prompt": "a", "completion": "b"}, ORIGIN, "alpaca")
    with pytest.raises(DataError, match="neither messages nor conversations"):
        parse({"prompt": "a", "completion": "b"}, ORIGIN, "sharegpt")


@pytest.mark.parametrize(
    ("flags", "is_trained"),
    [
        ({}, True),
        ({"weight": None, "train": None}, True),
        ({"weight": 0}, False),
        ({"weight": 1.0, "train": True}, True),
        ({"train": False}, False),
        ({"weight": 0, "train": False}, False),
    ],
)
def test_a_turn_may_be_context_only(flags: dict[str, Any], is_trained: bool) -> None:
    end = [("human", "c"), ("gpt", "d")]
    sharegpt = turns(ASK, ("gpt", "b"), *end)
    sharegpt["conversations"][1] |= flags
    messages = {"messages": [{"role": "assistant" if t["from"] == "gpt" else "user", "content": t["value"]} | {
        key: value for key, value in t.items() if key in flags} for t in sharegpt["conversations"]]}  # fmt: skip
    for row in (sharegpt, messages):
        assert [message.trained for message in read(row).messages if message.role == "assistant"] == [is_trained, True]


@pytest.mark.parametrize(
    ("index", "flags", "what"),
    [
        (1, {"weight": 0, "train": True}, "conversations[1] has weight 0 and train True"),
        (1, {"train": "yes"}, "conversations[1].train is a string, not a boolean"),
        (1, {"weight": [1]}, "conversations[1].weight is a list"),
        (0, {"train": True}, "conversations[0].train is true in a turn of role user; only the assistant's"),
        (2, {"train": False}, "conversations[2] and the entry before it are one turn of the assistant"),
    ],
)
def test_flags_that_cannot_be(index: int, flags: dict[str, Any], what: str) -> None:
    row = turns(ASK, ("gpt", "b"), ("function_call", '{"name": "f"}'))
    row["conversations"][index] |= flags
    with pytest.raises(DataError) as raised:
        read(row)
    assert what in raised.value.what


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("human user", "user"),
        ("gpt assistant model chatgpt bard bing", "assistant"),
        ("observation tool function function_response tool_response", "tool"),
        ("function_call tool_call", "assistant"),
        ("system", "system"),
    ],
)
def test_every_usual_name_of_a_sharegpt_role(names: str, role: str) -> None:
    for name in names.split():
        call = '{"name": "f", "arguments": {}}'
        before = [ASK, ("function_call", call)] if role == "tool" else [] if role in ("user", "system") else [ASK]
        value = call if name.endswith("_call") else "x"
        found = read(turns(*before, (name, value), ("human", "y"), ("gpt", "z"))) if not name.endswith("_call") else read(
            turns(*before, (name, value)))  # fmt: skip
        assert found.messages[len(before)].role == role
