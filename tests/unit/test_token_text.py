"""Every token reads as the characters that it completes: together they are the text, whatever the tokenizer."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft_dist.data.token_text import TokenText, alone, visible
from tests.golden.vocabularies import byte_level, sentencepiece, unigram

MARKS = ["<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello there, assistant",
    " two  spaces and a trailing one ",
    "東京の天気は晴れです。鱻🙂👨\u200d👩\u200d👧 ",
    "<|im_start|>user\nHello\r\n\tこんにちは<|im_end|>\n<|im_start|>assistant\n東京<|im_end|>",
    "a\ufffdb",
]


def wordpiece() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "a", "hello", "assist", "##ant", "東", "京", ",", "!"]
    backend = Tokenizer(models.WordPiece({word: id for id, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_level": partial(byte_level, MARKS, bos=None, eos="</s>"),
    "sentencepiece": partial(sentencepiece, MARKS, bos="<s>", eos="</s>", first_space=True),
    "sentencepiece_without_space": partial(sentencepiece, MARKS, bos="<s>", eos="</s>", first_space=False),
    "unigram": partial(unigram, MARKS, bos="<s>", eos="</s>"),
}


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    ids: list[int] = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@pytest.mark.parametrize("kind", MAKERS)
def test_the_texts_of_all_tokens_are_what_the_whole_is_decoded_to(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    read, draw = TokenText(tokenizer), random.Random(0)
    pieces = ["Hello", " there", " ", "東京", "鱻", "🙂", "é", "\n", "<|im_end|>", ".", "こんにちは", "\u3000"]
    for text in [*TEXTS, *("".join(draw.choices(pieces, k=12)) for _ in range(200))]:
        ids = ids_of(tokenizer, text)
        texts = read(ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False), text
        assert "\ufffd" in text or "\ufffd" not in "".join(texts)


def test_a_tokenizer_of_another_kind_is_read_through_its_own_decoder() -> None:
    tokenizer = wordpiece()
    ids = ids_of(tokenizer, "hello assistant, 東 京 a!")
    assert TokenText(tokenizer)(ids) == ["hello", " assist", "ant", " ,", " 東", " 京", " a", " !"]
    assert tokenizer.backend_tokenizer.decode(ids) == "hello assistant , 東 京 a !"


def test_a_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = MAKERS["byte_level"]()
    assert TokenText(tokenizer)(ids_of(tokenizer, "鱻a")) == ["", "", "鱻", "a"]
    # The middle token holds the end of one character and the beginning of the next.
    alphabet = {character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    end, beginning = byte_characters("あい")[2:4]
    backend = Tokenizer(models.BPE(vocab={**alphabet, end + beginning: 256}, merges=[(end, beginning)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    overlapping = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = ids_of(overlapping, "あい")
    assert len(ids) == 5
    assert ids[2] == 256
    assert TokenText(overlapping)(ids) == ["", "", "あ", "", "い"]


def byte_characters(text: str) -> str:
    backend = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return str(backend.pre_tokenize_str(text)[0][0])


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "unigram"])
def test_bytes_of_a_character_that_was_cut_are_shown(kind: str) -> None:
    tokenizer = MAKERS[kind]()
    read = TokenText(tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    whole = ids_of(tokenizer, "Hi🙂")
    assert "".join(read(whole)) == "Hi🙂"
    assert "".join(read(whole[:-1])) == "Hi\\xf0\\x9f\\x99"
    assert "".join(read([*whole[:-2], end])) == "Hi\\xf0\\x9f<|im_end|>"
    assert "".join(read(whole[-2:])) == "\\x99\\x82"


def test_special_tokens_are_those_that_stand_for_themselves() -> None:
    tokenizer = MAKERS["byte_level"]()
    tokenizer.backend_tokenizer.add_tokens(
        [AddedToken("\n\n\n\n", normalized=False), AddedToken("<think>"), AddedToken("<é>")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    read = TokenText(tokenizer)
    ids = ids_of(tokenizer, "<|im_start|>Hello\n\n\n\n<think><é>")
    assert [(text, read.is_special(id)) for text, id in zip(read(ids), ids, strict=True)] == [
        ("<|im_start|>", True),
        ("Hello", False),
        ("\n\n\n\n", False),
        ("<think>", True),
        ("<é>", True),
    ]


def test_nothing_invisible_stays_so() -> None:
    assert visible("a\nb\tc\r\x1b[31m") == "a↵\nb⇥c[U+000D][U+001B][31m"
    assert visible("全角\u3000空白 \u200b\u202e\ufeff") == "全角\u3000空白 [U+200B][U+202E][U+FEFF]"
    assert visible("👨\u200d👩\u200d👧☀\ufe0f") == "👨\u200d👩\u200d👧☀\ufe0f"
    assert alone(" a\n\n") == "␣a↵↵"
    assert alone("\u200d") == "[U+200D]"
    assert alone("☀\ufe0f") == "☀\ufe0f"
