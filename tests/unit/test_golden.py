"""Each family of chat templates against its golden files, token by token, and against what a model is asked with.

After a change that is meant, ``python -m tests.golden.regenerate`` writes the files anew; read the difference.
"""

from __future__ import annotations

from functools import cache

import pytest

from sft_dist.data.chat_template import ChatRenderer
from tests.golden.conversations import CONVERSATIONS
from tests.golden.families import FAMILIES, TAGGED
from tests.golden.golden import FOLDER, REGENERATE, golden_path, golden_text, read_golden

CASES = [(family, name) for family in FAMILIES for name in CONVERSATIONS]
RENDERED = [case for case in CASES if not golden_path(*case).read_text(encoding="utf-8").startswith("refused: ")]

# Turns whose prompt is not how the row begins, numbered from 1 among those that are trained.
# Mistral: the tools move to the last question. R1: the prompt opens a reasoning block, which finished turns do not have.
OTHER_PROMPT = (
    {("mistral", "tools"): {1, 2}, ("deepseek_r1", "tools"): {1, 3}}
    | {
        ("deepseek_r1", name): {1, 2, 3}
        for name in ("single", "multi", "system", "untrained", "emoji", "japanese", "whitespace")
    }
    | {("deepseek_r1", "parallel_tools"): {1}}
)
# The line breaks that the answer begins with are one token with that of the prompt: which token the model would choose
# after the prompt cannot be told from the row, so nothing of that token is trained.
JOINED = {(family, "whitespace"): {1} for family in ("chatml", "qwen3", "qwen2_5", "base_chatml")}


@cache
def renderer_of(family: str) -> ChatRenderer:
    return FAMILIES[family].renderer()


@pytest.mark.parametrize(("family", "name"), CASES)
def test_ids_and_labels_are_golden(family: str, name: str) -> None:
    path = golden_path(family, name)
    golden = path.read_text(encoding="utf-8")
    assert golden_text(renderer_of(family), CONVERSATIONS[name]) == golden, f"{path}: {REGENERATE}, then read the diff"
    if not golden.startswith("refused: "):
        assert renderer_of(family).render(CONVERSATIONS[name]) == read_golden(golden)


def test_every_golden_file_is_compared() -> None:
    assert set(FOLDER.glob("*/*.txt")) == {golden_path(family, name) for family, name in CASES}


@pytest.mark.parametrize("family", TAGGED)
def test_generation_tags_change_no_label(family: str) -> None:
    renderer = FAMILIES[family].renderer(TAGGED[family])
    plain = {name: golden_path(family, name).read_text(encoding="utf-8") for name in CONVERSATIONS}
    for name, conversation in CONVERSATIONS.items():
        if plain[name].startswith("refused: "):
            assert golden_text(renderer, conversation).startswith("refused: ")
        else:
            assert golden_text(renderer, conversation) == plain[name], name


@pytest.mark.parametrize(("family", "name"), RENDERED)
def test_what_is_trained_follows_the_prompt_of_inference(family: str, name: str) -> None:
    """The tokens of the prompt that transformers makes for a turn are those in front of its trained ones."""
    renderer, conversation = renderer_of(family), CONVERSATIONS[name]
    row, sample, tokenizer = renderer.render(conversation), renderer.sample(conversation), renderer.tokenizer
    assert sample.text == tokenizer.apply_chat_template(sample.messages, tools=sample.tools, tokenize=False)
    is_first = [now and not before for before, now in zip([False, *row.supervised], row.supervised, strict=False)]
    starts = [index for index, is_start in enumerate(is_first) if is_start]
    answers = [index for index, message in enumerate(sample.messages) if message["role"] == "assistant"]
    is_trained = [message.trained for message in conversation.messages if message.role == "assistant"]
    turns = [index for index, trained in zip(answers, is_trained, strict=True) if trained]
    other = OTHER_PROMPT.get((family, name), set()) | JOINED.get((family, name), set())
    for number, (start, turn) in enumerate(zip(starts, turns, strict=True), start=1):
        prompt = tokenizer.apply_chat_template(
            sample.messages[:turn], tools=sample.tools, add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert (row.input_ids[:start] == ids) == (number not in other), f"turn {number}"
