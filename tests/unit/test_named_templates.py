"""A chat template as file, as text, by name, and built for a base model that has none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sft_dist.data.chat_template import ChatRenderer, load_renderer
from sft_dist.data.jinja_template import JinjaTemplate
from sft_dist.data.named_templates import BUILT_IN, END_OF_TURN, built_in_source, form_of, read_template
from sft_dist.errors import ConfigError, DataError
from tests.golden.families import FAMILIES
from tests.golden.vocabularies import byte_level, sentencepiece
from tests.helpers.templates import CHATML, conversation, supervised_texts

CHAT = conversation(("user", "Hi"), ("assistant", "Hello"))
INLINE = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{% endfor %}"


def plain(**options: Any) -> Any:
    return byte_level([], bos=None, eos="<eos>", **options)


def test_the_three_forms() -> None:
    assert [form_of(given) for given in ("chatml", "./chatml", "a/b.jinja", INLINE, "{{ x }}")] == [
        "name", "file", "file", "inline", "inline",
    ]  # fmt: skip


def test_a_file_text_and_a_name_give_the_same_row(tmp_path: Path) -> None:
    (tmp_path / "chatml.jinja").write_text(CHATML, encoding="utf-8")
    given = ["chatml", CHATML, str(tmp_path / "chatml.jinja")]
    rows = [ChatRenderer(FAMILIES["chatml"].tokenizer(), template).render(CHAT) for template in given]
    assert rows[0] == rows[1] == rows[2]


def test_built_in_templates_are_all_there_and_their_tokens_in_them() -> None:
    folder = Path(built_in_source.__globals__["__file__"]).parent / "templates"
    assert {file.stem for file in folder.iterdir()} == set(BUILT_IN)
    for name, tokens in BUILT_IN.items():
        source = built_in_source(name)
        JinjaTemplate(source, name=name, variables={})
        if name == "phi3":
            source = source.replace("'<|' + message.role + '|>", "<|system|><|user|><|assistant|>")
        assert all(token in source for token in tokens), name
        marks = set(re.findall(r"<[|｜][^<>' ]+[|｜]>|\[/?[A-Z_]{4,}\]|<(?:start|end)_of_turn>", source))
        assert marks <= set(tokens), name


@pytest.mark.parametrize(("name", "missing"), [(name, tokens) for name, tokens in BUILT_IN.items() if tokens])
def test_tokens_that_the_tokenizer_does_not_know_are_named(name: str, missing: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as raised:
        ChatRenderer(byte_level(missing[:1], bos="<s>", eos="</s>"), name)
    if missing[1:]:
        assert f"data.chat_template: {name} writes {', '.join(missing[1:])}, which" in raised.value.what
    assert '"' + missing[-1] + '"' in raised.value.fix
    assert "model.add_tokens" in raised.value.fix
    assert "method.train_tokens" in raised.value.fix


def test_added_tokens_count_as_known(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    renderer = load_renderer(str(tmp_path), None, "chatml", added_tokens=["<|im_start|>", "<|im_end|>"])
    assert supervised_texts(renderer, renderer.render(CHAT)) == ["Hello<|im_end|>"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_eos_becomes_what_ends_an_answer(name: str) -> None:
    renderer = ChatRenderer(byte_level(BUILT_IN[name], bos="<s>", eos="<|endoftext|>"), name)
    tokenizer, row = renderer.tokenizer, renderer.render(CHAT)
    ends = [id for id, is_supervised in zip(row.input_ids, row.supervised, strict=True) if is_supervised]
    assert ends[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token == END_OF_TURN.get(name, "<|endoftext|>")


def test_a_built_in_template_needs_the_eos_that_it_writes() -> None:
    tokenizer = plain()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="plain ends an answer with EOS, and the tokenizer of the model has none"):
        ChatRenderer(tokenizer, "plain")


@pytest.mark.parametrize(
    ("given", "what", "fix"),
    [
        ("chatlm", "chatlm is neither a file nor a built-in template", "did you mean chatml?"),
        ("Qwen-3", "Qwen-3 is neither a file nor a built-in template", "did you mean qwen3?"),
        ("none.jinja", "none.jinja is neither a file that exists, nor Jinja,", "one of chatml, llama3, mistral,"),
        ("./chatml.jinja/x", "./chatml.jinja/x is neither a file that exists, nor", "the path of a Jinja file"),
    ],
)
def test_what_is_none_of_the_three(given: str, what: str, fix: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ChatRenderer(plain(), given)
    assert raised.value.what.startswith(f"data.chat_template: {what}")
    assert fix in raised.value.fix


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "sjis.jinja").write_bytes("{{ '指示' }}".encode("shift_jis"))
    with pytest.raises(DataError, match="is not UTF-8"):
        read_template(str(tmp_path / "sjis.jinja"))


# --- no template at all -----------------------------------------------------------------------------------------------


def test_a_base_model_that_knows_chatml_gets_chatml_and_says_so() -> None:
    renderer = ChatRenderer(byte_level(BUILT_IN["chatml"], bos=None, eos="<eos>"))
    assert renderer.tokenizer.chat_template == built_in_source("chatml")
    assert renderer.notice == (
        "the tokenizer has no chat template: the rows are written, and the model is saved, with the built-in chatml "
        "(it knows <|im_start|> and <|im_end|>, which becomes its EOS); data.chat_template sets another"
    )


def test_any_other_gets_role_words_and_its_eos_and_says_so() -> None:
    renderer = ChatRenderer(plain())
    assert renderer.notice is not None
    assert (
        "the built-in plain (it does not know <|im_start|> and <|im_end|>, so roles are words and <eos>"
        in renderer.notice
    )
    assert renderer.text(CHAT) == "User:\nHi\n\nAssistant:\nHello<eos>\n"
    assert supervised_texts(renderer, renderer.render(CHAT)) == ["Hello<eos>"]


def test_a_template_that_is_there_is_left_alone_in_silence() -> None:
    tokenizer = byte_level(BUILT_IN["chatml"], bos=None, eos="<eos>")
    tokenizer.chat_template = INLINE
    renderer = ChatRenderer(tokenizer)
    assert (renderer.notice, tokenizer.chat_template) == (None, INLINE)


@pytest.mark.parametrize("name", ["plain", "chatml", "phi3"])
def test_bos_stands_in_front_where_the_tokenizer_puts_it_there(name: str) -> None:
    for adds_bos in (True, False):
        options = {"bos": "<s>", "eos": "</s>", "adds_bos": adds_bos}
        for tokenizer in (
            byte_level(BUILT_IN[name], **options),
            sentencepiece(BUILT_IN[name], first_space=True, **options),
        ):
            row = ChatRenderer(tokenizer, name).render(CHAT)
            assert row.input_ids.count(tokenizer.bos_token_id) == adds_bos
            assert (row.input_ids[0] == tokenizer.bos_token_id) == adds_bos


def test_the_built_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    sentencepiece([], bos="<s>", eos="</s>", first_space=True, adds_bos=True).save_pretrained(tmp_path / "base")
    renderer = load_renderer(str(tmp_path / "base"), None, None)
    renderer.tokenizer.save_pretrained(tmp_path / "final")
    saved = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert saved.chat_template == "{{- bos_token }}\n" + built_in_source("plain")
    messages = [{"role": "user", "content": "Hi"}]
    asked = saved.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert renderer.render(CHAT).input_ids[: len(asked)] == asked
    again = load_renderer(str(tmp_path / "final"), None, None)
    assert again.notice is None
    assert again.render(CHAT) == renderer.render(CHAT)
