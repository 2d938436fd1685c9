"""What of a conversation is trained, and how a long one becomes several."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config.data_schema import DataConfig
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.messages import Conversation, Message, Origin, ToolCall
from sft_dist.data.prepare import counts_of, prepare_sets
from sft_dist.data.prepared import open_prepared
from sft_dist.data.splitting import split_conversation, split_tokens
from sft_dist.data.supervision import Supervision, vary_prompt
from sft_dist.train.summary import notices

HERE = Origin("rows.jsonl", 1)


def conversation(*turns: tuple[str, str] | Message) -> Conversation:
    messages = tuple(turn if isinstance(turn, Message) else Message(turn[0], turn[1]) for turn in turns)  # type: ignore[arg-type]
    return Conversation(messages, (), HERE)


@pytest.fixture(scope="module")
def renderer(tiny_base: Path) -> ChatRenderer:
    return load_renderer(str(tiny_base), None, None)


def trained(renderer: ChatRenderer, row: Conversation, supervision: Supervision) -> list[str]:
    """The runs of trained tokens, as text."""
    tokens = renderer.render(row, supervision)
    runs: list[list[int]] = [[]]
    for id, is_trained in zip(tokens.input_ids, tokens.supervised, strict=True):
        if is_trained:
            runs[-1].append(id)
        elif runs[-1]:
            runs.append([])
    return [renderer.tokenizer.decode(run) for run in runs if run]


TWO = conversation(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e"))
CONTEXT = conversation(("user", "a"), Message("assistant", "b", trained=False), ("user", "c"), ("assistant", "d"))
CALL = Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),))
TOOLS = conversation(("user", "a"), CALL, Message("tool", "r"), ("assistant", "d"))
THOUGHT = conversation(
    ("user", "a"), ("assistant", "<think>\nlong\n</think>\n\nb"), ("user", "c"), ("assistant", "<think>why</think>d")
)


@pytest.mark.parametrize(
    ("row", "supervision", "expected"),
    [
        (TWO, Supervision(), ["b<|im_end|>", "d<|im_end|>"]),
        (TWO, Supervision("last_assistant"), ["d<|im_end|>"]),
        (
            TWO,
            Supervision("all"),
            [
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
                "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n<|im_start|>user\ne<|im_end|>"
            ],
        ),
        (CONTEXT, Supervision(), ["d<|im_end|>"]),
        (
            CONTEXT,
            Supervision("all"),
            [
                "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
                "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>",
            ],
        ),
        (TOOLS, Supervision(), ['{"name": "f", "arguments": {"x": 1}}<|im_end|>', "d<|im_end|>"]),
        (TOOLS, Supervision(tool_calls=False), ["d<|im_end|>"]),
        (THOUGHT, Supervision(), ["<think>\nlong\n</think>\n\nb<|im_end|>", "<think>why</think>d<|im_end|>"]),
        (THOUGHT, Supervision(reasoning=False), ["b<|im_end|>", "d<|im_end|>"]),
        (THOUGHT, Supervision("last_assistant", reasoning=False), ["d<|im_end|>"]),
    ],
)
def test_what_is_trained(
    renderer: ChatRenderer, row: Conversation, supervision: Supervision, expected: list[str]
) -> None:
    assert trained(renderer, row, supervision) == expected


def test_reasoning_that_a_file_keeps_apart(renderer: ChatRenderer, tmp_path: Path, tiny_base: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    thinking = load_renderer(str(tiny_base), None, template)
    row = conversation(("user", "a"), Message("assistant", "b", reasoning="b or not b"))
    assert trained(thinking, row, Supervision()) == ["<think>b or not b</think>b<|im_end|>"]
    assert trained(thinking, row, Supervision(reasoning=False)) == ["b<|im_end|>"]


def test_a_prompt_is_varied_by_the_seed_and_nothing_else(renderer: ChatRenderer) -> None:
    templates = ["{prompt}", "Q: {prompt} {x}", "質問: {prompt}"]

    def first(row: int, seed: int) -> str:
        varied = vary_prompt(Conversation(TWO.messages, (), Origin("any", row)), templates, seed)
        assert varied.messages[2:] == TWO.messages[2:]
        return varied.messages[1].content

    drawn = [first(row, 0) for row in range(60)]
    assert drawn == [first(row, 0) for row in range(60)]
    assert drawn != [first(row, 1) for row in range(60)]
    assert set(drawn) == {"a", "Q: a {x}", "質問: a"}
    assert min(Counter(drawn).values()) >= 10


TURNS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(turns=TURNS, has_system=st.booleans(), last_user=st.booleans(), limit=st.integers(40, 200))
def test_parts_hold_every_answer_once_within_the_limit(
    turns: list[tuple[int, int, bool]], has_system: bool, last_user: bool, limit: int
) -> None:
    renderer = SPLITTER[0]
    messages = [Message("system", "sys")] if has_system else []
    for number, (question, answer, is_trained) in enumerate(turns):
        messages += [
            Message("user", f"{number}?" + "q" * question),
            Message("assistant", f"{number}!" + "a" * answer, trained=is_trained or number == 0),
        ]
    messages += [Message("user", "and")] if last_user else []
    whole = Conversation(tuple(messages), (), HERE)

    def render(row: Conversation) -> tuple[list[int], list[bool]]:
        tokens = renderer.render(row)
        return tokens.input_ids, tokens.supervised

    parts = list(split_conversation(whole, limit, render))
    assert all(len(part.input_ids) == len(part.supervised) <= limit for part in parts)
    answers = [m.content + "<|im_end|>" for m in messages if m.role == "assistant" and m.trained]
    said = "".join(
        renderer.tokenizer.decode([id for id, on in zip(part.input_ids, part.supervised, strict=True) if on])
        for part in parts
    )
    assert said == "".join(answers), "every answer is trained once, in order"
    for part in parts:
        text = renderer.tokenizer.decode(part.input_ids)
        if not part.is_cut:
            assert text.startswith("<|im_start|>system\nsys" if has_system else "<|im_start|>user\n")
            assert text.count("<|im_start|>assistant") == text.count("!")


SPLITTER: list[ChatRenderer] = []


@pytest.fixture(scope="module", autouse=True)
def splitter(renderer: ChatRenderer) -> None:
    SPLITTER.append(renderer)


def test_parts_keep_the_tools_of_the_whole() -> None:
    """Templates write them into the system prompt, without which a call of one comes from nowhere."""
    tool = {"type": "function", "function": {"name": "f"}}
    seen: list[Conversation] = []

    def render(row: Conversation) -> tuple[list[int], list[bool]]:
        seen.append(row)
        tokens = [0] * 10 * len(row.messages)
        return tokens, [True] * len(tokens)

    parts = list(split_conversation(replace(TWO, tools=(tool,)), 40, render))
    assert [len(part.input_ids) for part in parts] == [30, 40]
    assert {part.is_cut for part in parts} == {False}
    assert all(row.tools == (tool,) and row.messages[0] == TWO.messages[0] and row.origin == HERE for row in seen)


def test_an_answer_before_the_first_question_is_trained_once_too() -> None:
    """It is no system prompt, which each part would begin with."""
    row = conversation(("assistant", "hello"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))

    def render(row: Conversation) -> tuple[list[int], list[bool]]:
        text = "".join(message.content for message in row.messages).encode()
        return list(text), [True] * len(text)

    parts = list(split_conversation(row, 7, render))
    assert [bytes(part.input_ids) for part in parts] == [b"helloab", b"cd"]


def test_tokens_are_cut_into_equal_parts() -> None:
    parts = list(split_tokens((list(range(10)), [True] * 10), 4))
    assert [part.input_ids for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(part.is_cut for part in parts)


def test_split_rows_are_counted_and_keep_their_origin(tmp_path: Path, tiny_base: Path) -> None:
    long = [
        {"role": r, "content": c * 30}
        for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    rows: list[Any] = [
        {"messages": long},
        {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = partial(load_renderer, str(tiny_base), None, None)
    config = {"train": [{"path": str(tmp_path / "rows.jsonl")}], "max_seq_len": 120, "over_length": "split"}
    folder = prepare_sets(DataConfig.model_validate(config), Cache(tmp_path / "cache", load(), load)).train
    assert folder is not None
    data, (counts,) = open_prepared(folder), counts_of(folder).values()
    assert {name: counts[name] for name in ("rows", "split_rows", "cut_parts", "untrained_parts")} == {
        "rows": 4, "split_rows": 2, "cut_parts": 1, "untrained_parts": 2,
    }  # fmt: skip
    assert data.lengths.max() <= 120
    assert notices(counts, 120) == [
        "2 rows longer than 120 tokens split; 1 part cut inside a turn; 2 parts without an answer left out"
    ]


def tokenised_rows(folder: Path, base: Path, *, seed: int = 0, **config: Any) -> list[list[int]]:
    """Ids of the rows of ``rows.jsonl``, all in one cache."""
    load = partial(load_renderer, str(base), None, None)
    source = {"path": str(folder / "rows.jsonl"), "templates": config.pop("templates", [])}
    data = DataConfig.model_validate({"train": [source], "max_seq_len": 256, "packing": "none", **config})
    prepared = open_prepared(prepare_sets(data, Cache(folder / "cache", load(), load), seed=seed).train or folder)
    return [
        [id if on else -id - 1 for id, on in zip(*(part.tolist() for part in prepared.row(number)), strict=True)]
        for number in range(prepared.num_rows)
    ]


def test_every_setting_of_a_row_makes_data_of_its_own(tmp_path: Path, tiny_base: Path) -> None:
    """In one cache, one after the other: none is given what another one prepared."""
    turns = [("system", "s"), ("user", "a"), ("assistant", "<think>x</think>b"), ("user", "c"), ("assistant", "d" * 99)]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    messages = [*({"role": role, "content": text} for role, text in turns), {"role": "user", "content": "e"}, call]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    asked: list[dict[str, Any]] = [
        {},
        {"train_on": "last_assistant"},
        {"train_on": "all"},
        {"train_reasoning": False},
        {"train_tool_calls": False},
        {"max_seq_len": 150, "over_length": "split"},
        {"max_seq_len": 150, "over_length": "split", "train_on": "last_assistant"},
        {"max_seq_len": 150, "over_length": "truncate"},
        {"templates": ["Q: {prompt}", "{prompt}?"]},
        {"templates": ["Q: {prompt}", "{prompt}?"], "seed": 1},
        {"templates": ["{prompt}!", "{prompt}?"]},
    ]
    made = [tokenised_rows(tmp_path, tiny_base, **each) for each in asked]
    assert [len(rows) for rows in made] == [8] * 5 + [24] + [8] * 5
    assert len({str(rows) for rows in made}) == len(asked)
