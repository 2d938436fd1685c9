"""Tokenising by pieces is the tokenizer's own result, for every text and every span, or it is not done."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sft_dist.data.row_tokenizer import RowTokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_CJK = r"[一-龥぀-ゟ゠-ヿ]+"
DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MARKS = ["<|start|>", "<|end|>", "</s>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog's back, again and again; isn't it 12345 times?",
    "日本語の文章です。東京は日本の首都で、人口は約千四百万人です。",
    "def f(x):\n    return x + 1\n\nfoo bar. Foo Bar! user assistant system",
] * 3


def byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


KINDS = {
    "gpt2": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2-prefix": (None, lambda: pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": (None, lambda: pre_tokenizers.Sequence([split(LLAMA3), byte_level()])),
    "qwen": (normalizers.NFC, lambda: pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), byte_level()])),
    "deepseek": (
        None,
        lambda: pre_tokenizers.Sequence(
            [split(r"\p{N}{1,3}"), split(DEEPSEEK_CJK), split(DEEPSEEK_WORDS), byte_level()]
        ),
    ),
    "metaspace": (None, lambda: pre_tokenizers.Metaspace(prepend_scheme="first")),
    "spaces": (None, lambda: pre_tokenizers.Sequence([split("(?<= ) +"), byte_level()])),
    "lowercase": (normalizers.Lowercase, lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)),
}
LOOKS_UP = {"gpt2", "gpt2-prefix", "llama3", "qwen", "deepseek", "metaspace"}


@lru_cache
def tokenizer_of(kind: str, marks: tuple[AddedToken, ...] = ()) -> PreTrainedTokenizerFast:
    normalizer, splitter = KINDS[kind]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    if normalizer is not None:
        tokenizer.normalizer = normalizer()
    tokenizer.pre_tokenizer = splitter()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = (["<unk>"] if kind == "metaspace" else []) + MARKS
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_tokens(list(marks), special_tokens=True)
    return fast


@lru_cache
def row_tokenizer_of(kind: str) -> RowTokenizer:
    return RowTokenizer(tokenizer_of(kind), MARKS)


WORDS = st.sampled_from(
    ["fox", "The", "dog's", "again;", "a", "I", "1", "x+1", "日本語", "東京。", "é", "e\u0301", "\u0301", "\u00a0", "\u3000", "🦊",
     "👩‍👩‍👧", "ﬁ", "\x00", "(", '"q"', "</s", *MARKS]
)  # fmt: skip
GAPS = st.sampled_from(["", " ", " ", " ", "  ", "\n", " \n", "\t", "\r\n\n"])
TEXTS = st.lists(st.one_of(st.tuples(WORDS, GAPS), st.tuples(st.text(max_size=4), GAPS)), min_size=1, max_size=14).map(
    lambda parts: "".join(word + gap for word, gap in parts)
)


@st.composite
def texts_with_spans(draw: st.DrawFn) -> tuple[str, list[tuple[int, int]]]:
    text = draw(TEXTS.filter(bool))
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
    return text, list(zip(places[::2], places[1::2], strict=False))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=texts_with_spans())
@example(case=("<|start|>The fox<|end|>\n<|start|>a fox jumps over it<|end|>\n", [(32, 59)]))
@example(case=("The fox jumps over", [(0, 3), (3, 7), (8, 18)]))
def test_pieces_give_what_the_whole_text_gives(kind: str, case: tuple[str, list[tuple[int, int]]]) -> None:
    text, spans = case
    tokenise = row_tokenizer_of(kind)
    assert tokenise.looks_up == (kind in LOOKS_UP)
    if tokenise._pieces is not None:
        assert tokenise._pieces._cuts_words == (kind not in ("gpt2-prefix", "metaspace"))
    for _ in range(2):  # remembered the second time
        assert tokenise(text, spans) == tokenise._whole(text, spans)
    assert tokenise(text, []).input_ids == tokenizer_of(kind)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("fox jumps", special=True),
        AddedToken("<|start|>The", special=True),
        AddedToken("x<|", special=True),
        AddedToken("over.", special=True),
        AddedToken("r. ", special=True),
        AddedToken("<|mark|>", special=True, lstrip=True, rstrip=True),
        AddedToken("end", special=True, single_word=True),
    ],
    ids=str,
)
def test_added_tokens_that_reach_over_a_cut(token: AddedToken) -> None:
    tokenizer = tokenizer_of("llama3", (token,))
    tokenise = RowTokenizer(tokenizer, [*MARKS, str(token)])
    text = f"The fox jumps over x<|start|>The fox  {token} x <|end|> end<|end|>the end </s>\n"
    for _ in range(2):
        assert tokenise(text, [(2, 30)]) == tokenise._whole(text, [(2, 30)])


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft_dist.data.row_tokenizer.MAX_PIECES", 3)
    tokenise = RowTokenizer(tokenizer_of("gpt2"), MARKS)
    text = "a b c d e f " + "x" * 40 + " g"
    assert tokenise(text, []) == tokenise._whole(text, [])
    assert tokenise._pieces is not None
    assert len(tokenise._pieces) == 3
