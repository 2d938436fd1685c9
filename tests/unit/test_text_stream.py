"""Tokens become text one by one: no half characters, nothing of a stop string, no line that begins with a full stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft_dist.generate.terminal_text import WrappedText, visible
from sft_dist.generate.text_stream import REPLACEMENT, CharacterStream, StopStrings

TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters=REPLACEMENT), max_size=40)


@pytest.fixture(scope="module")
def byte_level(tiny_base: Path) -> PreTrainedTokenizerBase:
    """Each byte is a token: a character of Japanese is three."""
    return AutoTokenizer.from_pretrained(tiny_base)


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def stream(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    characters = CharacterStream(decode)
    return [*(characters.push(id) for id in ids), characters.finish()]


@given(text=TEXTS)
def test_no_half_character_is_shown_and_nothing_is_lost(byte_level: PreTrainedTokenizerBase, text: str) -> None:
    ids = byte_level(text, add_special_tokens=False)["input_ids"]
    pieces = stream(decoder(byte_level), ids)
    assert "".join(pieces) == text
    assert REPLACEMENT not in "".join(pieces)


def test_a_character_is_shown_with_its_last_byte(byte_level: PreTrainedTokenizerBase) -> None:
    ids = byte_level("日😀a", add_special_tokens=False)["input_ids"]
    assert stream(decoder(byte_level), ids) == ["", "", "日", "", "", "", "😀", "a", ""]


@given(text=TEXTS, cut=st.integers(1, 3))
def test_a_character_that_the_limit_cuts_is_left_out(byte_level: PreTrainedTokenizerBase, text: str, cut: int) -> None:
    ids = byte_level(text + "😀", add_special_tokens=False)["input_ids"][:-cut]
    assert "".join(stream(decoder(byte_level), ids)) == text


@given(st.lists(st.integers(3, 258), max_size=30))
def test_bytes_that_are_no_characters_come_out_as_a_decoder_writes_them(
    byte_level: PreTrainedTokenizerBase, ids: list[int]
) -> None:
    whole = decoder(byte_level)(ids)
    shown = "".join(stream(decoder(byte_level), ids))
    assert whole.startswith(shown)
    assert set(whole[len(shown) :]) <= {REPLACEMENT}
    assert len(whole) - len(shown) <= 3


def test_what_a_byte_fallback_tokenizer_has_shown_stays() -> None:
    """Its decoder takes back a whole run of bytes when one of them is wrong."""
    vocabulary = {"<unk>": 0, "▁日": 1} | {f"<0x{value:02X}>": 2 + value for value in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    ids = [1, *(2 + byte for byte in "本".encode()), 2 + 0xE6]
    assert tokenizer.decode(ids).count(REPLACEMENT) == 4
    assert stream(tokenizer.decode, ids) == ["日", "", "", "本", "", ""]


@given(
    text=st.text("ab\n。", max_size=20),
    stop=st.lists(st.text("ab。", min_size=1, max_size=4), max_size=3),
    sizes=st.lists(st.integers(1, 4), max_size=20),
)
def test_a_stop_string_ends_the_text_however_it_comes(text: str, stop: list[str], sizes: list[int]) -> None:
    stops, shown, rest = StopStrings(stop), "", text
    for size in [*sizes, len(text)]:
        shown += stops.push(rest[:size])
        assert not any(each in shown for each in stop)
        rest = rest[size:]
    shown += stops.finish()
    # The first that is complete counts: it may begin behind one that is longer.
    ends = [text.find(each) + len(each) for each in stop if each in text]
    assert stops.found == bool(ends)
    assert shown == (text[: len(shown)] if ends else text)
    if ends:
        assert any(text[len(shown) :].startswith(each) for each in stop)


def wrapped(text: str, width: int | None) -> str:
    parts: list[str] = []
    writer = WrappedText(parts.append, None if width is None else (lambda: width))
    for character in text:
        writer.push(character)
    writer.finish()
    return "".join(parts)


@given(text=st.text("ab 日本、。「」\nゃ-", max_size=60), width=st.integers(2, 20))
def test_no_line_is_longer_than_the_terminal_and_only_spaces_are_lost(text: str, width: int) -> None:
    shown = wrapped(text, width)
    assert all(cell_len(line.rstrip(" ")) <= width for line in shown.split("\n"))
    assert shown.replace("\n", "").replace(" ", "") == text.replace("\n", "").replace(" ", "")


def test_lines_break_where_a_reader_expects_it() -> None:
    assert wrapped("one two three", 8) == "one two \nthree"
    assert wrapped("日本の首都です。", 14) == "日本の首都で\nす。"  # no line begins with a full stop
    assert wrapped("東京の「空」", 8) == "東京の\n「空」"  # and none ends with an opening bracket
    assert wrapped("a" * 7, 3) == "aaa\naaa\na"
    assert wrapped("日本の首都です。", None) == "日本の首都です。", "in a file lines are as the model writes them"


def test_a_model_does_not_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\r\nc\td\x07") == "a␛[2Jb\nc\td␇"
