"""What is trained on is exactly what the model writes at inference, for every style of template."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.masking import supervised_tokens
from sft_dist.data.messages import Conversation, Message, ToolCall
from sft_dist.errors import CheckpointError, DataError
from tests.helpers import templates as t
from tests.helpers.templates import conversation, renderer_of, supervised_texts

STYLES = {
    "chatml": ("chatml", t.CHATML),
    "generation": ("chatml", t.CHATML_GENERATION),
    "llama3": ("llama3", t.LLAMA3),
    "mistral": ("mistral", t.MISTRAL),
    "gemma": ("gemma", t.GEMMA),
    "qwen": ("chatml", t.QWEN),
    "r1": ("r1", t.R1),
    "no_eos": ("plain", t.NO_EOS),
}
CHAT = conversation(("user", "Hi"), ("assistant", "Hello there."), ("user", "天気は？"), ("assistant", "晴れです😀。"))
REASONED = conversation(
    ("user", "Hi"),
    ("assistant", "<think>\nearlier\n</think>\n\nHello"),
    ("user", "More"),
    ("assistant", "<think>\nlater\n</think>\n\nWorld"),
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "天気", "parameters": {}}}
CALL = Message("assistant", "", tool_calls=(ToolCall("weather", {"days": [1, 2]}),))
TOOLS = conversation(
    ("user", "Weather?"),
    CALL,
    ("tool", '{"sky": "晴れ"}'),
    ("assistant", "Sunny."),
    ("user", "Thanks"),
    ("assistant", "Bye"),
    tools=(TOOL,),
)
AS_JSON = '{"name": "weather", "arguments": {"days": [1, 2]}}'


def answers(style: str, row: Conversation) -> list[str]:
    renderer = renderer_of(*STYLES[style])
    return supervised_texts(renderer, renderer.render(row))


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", ["Hello there.<|im_end|>", "晴れです😀。<|im_end|>"]),
        ("generation", ["Hello there.<|im_end|>", "晴れです😀。<|im_end|>"]),
        ("llama3", ["Hello there.<|eot_id|>", "晴れです😀。<|eot_id|>"]),
        ("mistral", [" Hello there.</s>", " 晴れです😀。</s>"]),
        ("gemma", ["Hello there.<end_of_turn>", "晴れです😀。<end_of_turn>"]),
        ("qwen", ["Hello there.<|im_end|>", "<think>\n\n</think>\n\n晴れです😀。<|im_end|>"]),
        ("r1", ["Hello there.<|end|>", "晴れです😀。<|end|>"]),
        ("no_eos", ["Hello there.", "晴れです😀。</s>"]),
    ],
)
def test_answers_and_their_end_are_supervised(style: str, expected: list[str]) -> None:
    assert answers(style, CHAT) == expected


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_transformers_up_to_an_appended_eos(style: str) -> None:
    renderer = renderer_of(*STYLES[style])
    row = renderer.render(CHAT)
    text = renderer.text(CHAT)
    if style == "no_eos":
        text = text.rstrip()
        assert row.input_ids.pop() == renderer.tokenizer.eos_token_id
    elif style == "llama3":
        assert "Today Date: 26 Jul 2024" in text  # the same tokens on every day
    else:
        theirs = [{"role": message.role, "content": message.content} for message in CHAT.messages]
        assert text == renderer.tokenizer.apply_chat_template(theirs, tokenize=False)
    assert row.input_ids == renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert row.input_ids.count(renderer.tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("chatml", [f"{AS_JSON}<|im_end|>", "Sunny.<|im_end|>", "Bye<|im_end|>"]),
        ("generation", [f"{AS_JSON}<|im_end|>", "Sunny.<|im_end|>", "Bye<|im_end|>"]),
        (
            "llama3",
            ['{"name": "weather", "parameters": {"days": [1, 2]}}<|eot_id|>', "Sunny.<|eot_id|>", "Bye<|eot_id|>"],
        ),
        (
            "mistral",
            [
                '[TOOL_CALLS] [{"name": "weather", "arguments": {"days": [1, 2]}, "id": "call00000"}]</s>',
                " Sunny.</s>",
                " Bye</s>",
            ],
        ),
        ("gemma", [f"{AS_JSON}<end_of_turn>", "Sunny.<end_of_turn>", "Bye<end_of_turn>"]),
        (
            "qwen",
            [
                f"<tool_call>\n{AS_JSON}\n</tool_call><|im_end|>",
                "Sunny.<|im_end|>",
                "<think>\n\n</think>\n\nBye<|im_end|>",
            ],
        ),
        ("r1", ['<|call|>weather\n{"days": [1, 2]}<|end|>', "Sunny.<|end|>", "Bye<|end|>"]),
        ("no_eos", [AS_JSON, "Sunny.", "Bye</s>"]),
    ],
)
def test_tool_calls_are_supervised_and_nothing_is_lost(style: str, expected: list[str]) -> None:
    renderer = renderer_of(*STYLES[style])
    row = renderer.render(TOOLS)
    # Mistral's own tokens for calls: the decoder puts no space after them, the text has one.
    assert [text.replace("] [", "][") for text in supervised_texts(renderer, row)] == [
        text.replace("] [", "][") for text in expected
    ]
    text = renderer.tokenizer.decode(row.input_ids)
    assert all(part in text for part in ("Weather?", "weather", "天気", "sky", "晴れ", "Thanks"))


def test_what_a_plain_template_drops_is_put_into_content() -> None:
    text = renderer_of(*STYLES["chatml"]).text(TOOLS)
    assert text.startswith("<|im_start|>system\nYou can call the tools below.")
    assert "<|im_start|>tool\n" in text
    text = renderer_of(*STYLES["gemma"]).text(TOOLS)  # knows neither system nor tool
    assert text.startswith("<bos><start_of_turn>user\nYou can call the tools below.")
    assert '<start_of_turn>user\n<tool_response>\n{"sky": "晴れ"}\n</tool_response><end_of_turn>' in text


def test_a_template_that_would_print_arguments_as_python_gets_json() -> None:
    row = conversation(("user", "?"), CALL)
    renderer = renderer_of("r1", t.R1.replace("'\n' + call.arguments + eos", "'\n' ~ call.arguments ~ eos"))
    assert supervised_texts(renderer, renderer.render(row)) == ['<|call|>weather\n{"days": [1, 2]}<|end|>']


def test_results_of_calls_made_at_once_are_one_user_turn_where_the_role_is_unknown() -> None:
    twice = Message("assistant", "Both.", tool_calls=CALL.tool_calls * 2)
    row = conversation(("user", "?"), twice, ("tool", "one"), ("tool", "two"), ("assistant", "Done"))
    assert answers("gemma", row) == [f"Both.\n{AS_JSON}\n{AS_JSON}<end_of_turn>", "Done<end_of_turn>"]
    results = "user\n<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><end_of_turn>"
    assert results in renderer_of(*STYLES["gemma"]).text(row)


def test_earlier_reasoning_that_the_template_removes_is_no_answer() -> None:
    assert answers("qwen", REASONED) == ["Hello<|im_end|>", "<think>\nlater\n</think>\n\nWorld<|im_end|>"]
    assert answers("chatml", REASONED) == [f"{m.content}<|im_end|>" for m in REASONED.messages[1::2]]


def test_separate_reasoning_reaches_the_template() -> None:
    row = conversation(("user", "Hi"), Message("assistant", "Yes", reasoning="because"))
    assert answers("qwen", row) == ["<think>\nbecause\n</think>\n\nYes<|im_end|>"]
    with pytest.raises(DataError, match="drops a part of assistant turn 1: 'because'"):
        renderer_of(*STYLES["chatml"]).render(row)


@pytest.mark.parametrize("style", STYLES)
def test_untrained_answers_and_what_follows_the_last_trained_one(style: str) -> None:
    last = answers(style, CHAT)[-1]
    context = Message("assistant", "Hello there.", trained=False)
    row = Conversation((CHAT.messages[0], context, *CHAT.messages[2:]), (), CHAT.origin)
    assert answers(style, row) == [last]
    cut = Conversation((*CHAT.messages[:2], Message("user", "Left out")), (), CHAT.origin)
    renderer = renderer_of(*STYLES[style])
    tokens = renderer.render(cut)
    assert "Left out" not in renderer.tokenizer.decode(tokens.input_ids)
    assert len(supervised_texts(renderer, tokens)) == 1


def test_white_space_of_answer_and_template() -> None:
    row = conversation(("user", "Hi"), ("assistant", "  def f():\n    return 1  \n"))
    assert answers("chatml", row) == ["  def f():\n    return 1  \n<|im_end|>"]
    assert answers("generation", row) == ["  def f():\n    return 1  \n<|im_end|>"]
    assert answers("llama3", row) == ["def f():\n    return 1<|eot_id|>"]
    assert answers("no_eos", row) == ["  def f():\n    return 1</s>"]


def test_special_tokens_that_swallow_white_space_still_end_the_turn() -> None:
    renderer = renderer_of("chatml", t.CHATML, swallows_space=True)
    assert supervised_texts(renderer, renderer.render(CHAT)) == ["Hello there.<|im_end|>", "晴れです😀。<|im_end|>"]


def test_an_answer_equal_to_the_question_or_to_the_prompt_is_found() -> None:
    row = conversation(("user", "assistant\n"), ("assistant", "user"), ("user", "user"), ("assistant", "user"))
    for style in ("chatml", "generation", "no_eos"):
        assert [text.split("<")[0] for text in answers(style, row)] == ["user", "user"]


def test_chatml_on_a_tokenizer_without_its_tokens_ends_with_eos() -> None:
    renderer = renderer_of("plain", t.CHATML)
    assert supervised_texts(renderer, renderer.render(CHAT))[-1] == "晴れです😀。<|im_end|></s>"


def test_eos_only_after_the_last_answer() -> None:
    template = t.NO_EOS.replace("{% endfor %}", "{% if loop.last %}{{ eos_token }}{% endif %}{% endfor %}")
    renderer = renderer_of("plain", template)
    row = renderer.render(CHAT)
    assert supervised_texts(renderer, row) == ["Hello there.", "晴れです😀。\n\n</s>"]
    assert row.input_ids.count(renderer.tokenizer.eos_token_id) == 1


def test_another_end_of_turn_in_mid_conversation_is_not_what_a_turn_ends_with() -> None:
    template = (
        "{% for m in messages %}{{ m.role + ':' + m.content }}"
        "{{ '<|im_end|>' if loop.last else '<|endoftext|>' }}{% endfor %}"
    )
    row = conversation(("user", "Hi"), ("assistant", "Yes \n"), ("user", "Hi"), ("assistant", "Yes"))
    renderer = renderer_of("chatml", template + "{{ 'assistant:' if add_generation_prompt }}")
    assert supervised_texts(renderer, renderer.render(row)) == ["Yes \n", "Yes<|im_end|>"]


def test_generation_block_after_a_space_keeps_the_first_word() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %} {% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    renderer = renderer_of("mistral", template)
    assert supervised_texts(renderer, renderer.render(CHAT)) == [" Hello there.</s>", " 晴れです😀。</s>"]


def test_a_generation_block_that_the_template_trims_is_not_trusted() -> None:
    template = t.CHATML_GENERATION.replace(
        "{% generation %}{{ message['content'] }}{% endgeneration %}",
        "{% set said %}{% generation %} {{ message['content'] }} {% endgeneration %}{% endset %}{{ said | trim }}",
    )
    renderer = renderer_of("chatml", template)
    assert supervised_texts(renderer, renderer.render(CHAT)) == ["Hello there.<|im_end|>", "晴れです😀。<|im_end|>"]


# --- tokens against spans ---------------------------------------------------------------------------------------------


def test_a_token_that_begins_in_the_prompt_is_not_supervised() -> None:
    text = "ab cd<e>\n"
    spans = [(3, 8)]
    # "ab", " cd" (trimmed by the tokenizer to "cd", but its space is the prompt's), "<e>" with the line after it
    assert supervised_tokens(text, [(0, 2), (3, 5), (5, 9)], [False, False, True], spans) == [False, False, True]
    assert supervised_tokens(text, [(0, 2), (2, 3), (3, 5)], [False] * 3, spans) == [False, False, True]


def test_added_tokens_of_white_space_belong_where_they_stand() -> None:
    # prompt "a\n", answer "b\n\nc<e>", then a line break of the template
    offsets = [(0, 1), (1, 2), (2, 3), (3, 5), (5, 6), (6, 9), (9, 10)]
    added = [False, True, False, True, False, True, True]
    expected = [False, False, True, True, True, True, False]
    assert supervised_tokens("a\nb\n\nc<e>\n", offsets, added, [(2, 9)]) == expected


def test_a_token_that_ends_in_the_next_turn_is_not_supervised() -> None:
    assert supervised_tokens("ab.\n##", [(0, 2), (2, 4), (4, 6)], [False] * 3, [(0, 3)]) == [True, False, False]


def test_pieces_of_one_character_and_empty_tokens() -> None:
    text = "a犬 b"
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (3, 3), (3, 4)]  # three bytes of one character; a lone, trimmed space
    assert supervised_tokens(text, offsets, [False] * 6, [(1, 3)]) == [False, True, True, True, True, False]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "template", "row", "reason"),
    [
        ("gemma", t.GEMMA, conversation(("system", "s"), *CHAT.messages), "Gemma has no system role"),
        ("mistral", t.MISTRAL, conversation(*CHAT.messages[:1], *CHAT.messages), "roles must alternate"),
        ("r1", t.R1, conversation(("system", "Be brief"), *CHAT.messages), "drops the text of message 1 (role system)"),
        ("r1", t.R1, REASONED, "drops a part of assistant turn 2: 'later'"),
        ("chatml", "{{ messages[0]['content'] }}", CHAT, "drops the text of message 3 (role user)"),
        ("chatml", "{{ messages[9].content + 'x' }}", CHAT, "has no element 9"),
        (
            "chatml",  # says how long the answer is, ahead of it: nothing around it can be relied on
            "{% for m in messages %}{{ (messages | map(attribute='content') | join) | length }}"
            "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}",
            CHAT,
            "depends on the text of that turn",
        ),
        (
            "chatml",  # a note after a long conversation, where an EOS token would have to go
            "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
            "{{ '(end)' if messages | length > 2 }}",
            CHAT,
            "follows the last answer and is no end-of-turn token",
        ),
    ],
)
def test_what_cannot_be_located_is_refused(family: str, template: str, row: Conversation, reason: str) -> None:
    with pytest.raises(DataError) as raised:
        renderer_of(family, template).render(row)
    assert raised.value.what.startswith("rows.jsonl:1: ")
    assert reason in raised.value.what
    assert "data.chat_template" in raised.value.fix


def test_bad_template_and_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("\n{% for %}", encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not valid Jinja"):
        ChatRenderer(t.build_tokenizer("chatml", None), str(tmp_path / "bad.jinja"))
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_renderer(str(tmp_path), None, None)


def test_a_given_template_replaces_the_tokenizers_own_and_is_saved_with_it(tmp_path: Path) -> None:
    t.build_tokenizer("chatml", t.NO_EOS).save_pretrained(tmp_path / "model")
    (tmp_path / "chatml.jinja").write_text(t.CHATML, encoding="utf-8")
    renderer = load_renderer(str(tmp_path / "model"), None, str(tmp_path / "chatml.jinja"))
    assert supervised_texts(renderer, renderer.render(CHAT))[0] == "Hello there.<|im_end|>"
    renderer.tokenizer.save_pretrained(tmp_path / "trained")
    again = load_renderer(str(tmp_path / "trained"), None, None)
    assert again.render(CHAT) == renderer.render(CHAT)
