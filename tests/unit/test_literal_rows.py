"""Rows that no template touches: segments, documents, token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.formats import parse, recognise
from sft_dist.data.literal_rows import tokenize_row, tokenize_segments, tokenize_text
from sft_dist.data.messages import Origin, Row, Segment, Segments, TokenIds
from sft_dist.data.row_tokenizer import RowTokenizer
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError, RowError
from tests.helpers.templates import build_tokenizer

ORIGIN = Origin("rows.jsonl", 7)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """It has no template, and puts a BOS by itself."""
    return build_tokenizer("plain", None)


@pytest.fixture(scope="module")
def renderer(tokenizer: PreTrainedTokenizerFast) -> ChatRenderer:
    return ChatRenderer(tokenizer)


def read(row: dict[str, Any], layout: str | None = None) -> Row:
    return parse(row, ORIGIN, layout or recognise(row, ORIGIN))


def segments(*pieces: tuple[str, bool]) -> list[Segment]:
    return [Segment(text, trained) for text, trained in pieces]


# Reading


@pytest.mark.parametrize("key", ["train", "label"])
def test_segments_are_read_as_they_stand(key: str) -> None:
    row = {
        "segments": [{"text": "<s>Q: Hi\nA:", key: False}, {"text": " Hello!</s>", key: True}, {"text": "", key: True}]
    }
    expected = Segments(tuple(segments(("<s>Q: Hi\nA:", False), (" Hello!</s>", True), ("", True))), ORIGIN)
    assert read(row) == expected


def test_a_text_is_a_document_and_other_layouts_come_first() -> None:
    assert read({"text": "日本", "id": 1}) == Segments((Segment("日本", True),), ORIGIN, is_document=True)
    assert recognise({"text": "x", "instruction": "a", "output": "b"}, ORIGIN) == "alpaca"
    assert recognise({"text": "x", "input_ids": [1]}, ORIGIN) == "tokens"


@pytest.mark.parametrize(
    ("more", "trained"),
    [
        ({}, (True, True, True)),
        ({"labels": [-100, 6, 7]}, (False, True, True)),
        ({"labels": None, "loss_mask": [0, 0, 1]}, (False, False, True)),
        ({"completion_mask": [False, True, False]}, (False, True, False)),
        ({"completion_mask": [0, 1, 1], "assistant_masks": [1, 0, 1]}, (False, False, True)),
        ({"labels": [5, -100, 7], "loss_mask": [0, 1, 1], "attention_mask": [1, 1, 1]}, (False, False, True)),
    ],
)
def test_tokens_and_what_masks_them(more: dict[str, Any], trained: tuple[bool, ...]) -> None:
    assert read({"input_ids": [5, 6, 7], **more}) == TokenIds((5, 6, 7), trained, ORIGIN)


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        ({"segments": []}, "segments has 0 pieces and none to train on", "train: true"),
        ({"segments": [{"text": "a", "train": False}]}, "none to train on", "train: true"),
        ({"segments": [{"text": "", "train": True}]}, "none to train on", "train: true"),
        ({"segments": [{"text": "a"}]}, "segments[0] does not say whether it is trained", "true or false"),
        ({"segments": [{"text": "a", "train": 1}]}, "segments[0].train is a number, not a boolean", "true or false"),
        ({"segments": [{"text": "a", "train": True, "label": False}]}, "has train True and label False", "one of the two"),
        ({"segments": ["a"]}, "segments[0] is a string, not an object", "object"),
        ({"text": " \n"}, "text is empty", "remove the row"),
        ({"text": ["a"]}, "text is a list, not a string", "as a string"),
        ({"input_ids": []}, "input_ids is empty", "remove the row"),
        ({"input_ids": [1, 2.0]}, "input_ids[1] is a number with a decimal point, not an integer", "integers"),
        ({"input_ids": [1, True]}, "input_ids[1] is a boolean", "integers"),
        ({"input_ids": [1, -2]}, "input_ids[1] is no token's id", "tokenizer"),
        ({"input_ids": [1, 2**31]}, "input_ids[1] is no token's id", "tokenizer"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "labels[0] is 6, neither -100 nor the token itself, 5", "not shifted"),
        ({"input_ids": [5, 6], "labels": [5]}, "labels has 1 elements and input_ids has 2", "each token"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "no token is trained", "correct labels"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no token is trained (the first one", "correct labels"),
        ({"input_ids": [5]}, "no token is trained (the first one", "remove the row"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "loss_mask[1] is neither 0 nor 1", "write 1"),
        ({"input_ids": [5, 6], "attention_mask": [1, 0]}, "the row is padded", "without padding"),
    ],
)  # fmt: skip
def test_faults(row: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RowError) as raised:
        read(row)
    assert raised.value.what.startswith("rows.jsonl:7: ")
    assert what in raised.value.what
    assert fix in raised.value.fix


# Tokenising


def test_segments_are_tokenised_as_one_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """No border of a segment ends a token, nothing is added, and only tokens that are trained whole are trained."""
    tokenise = RowTokenizer(tokenizer)
    for pieces in (
        segments(("Question: the ans", False), ("wer is", True), (" the wor", True), ("ld.", False)),
        segments(("the world ", False), ("the world", True)),
        segments(("", True), ("日本", False), ("語で", True), ("", False), ("す。", True)),
    ):
        text = "".join(piece.text for piece in pieces)
        row = tokenize_segments(tokenise, pieces)
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        assert row.input_ids == encoding.ids
        trained = [piece.trained for piece in pieces for _ in piece.text]
        place = 0
        for (_, end), is_supervised in zip(encoding.offsets, row.supervised, strict=True):
            start = min(place, end - 1)  # with the space that the offsets leave out
            assert is_supervised == all(trained[start:end]), (text[start:end], pieces)
            place = max(place, end)


def test_a_token_across_two_trained_segments_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    one = tokenize_segments(RowTokenizer(tokenizer), segments(("Q:", False), (" the wo", True), ("rld", True)))
    other = tokenize_segments(RowTokenizer(tokenizer), segments(("Q:", False), (" the world", True)))
    assert (one.input_ids, one.supervised) == (other.input_ids, other.supervised)


def test_special_tokens_in_segments_are_those_of_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = tokenize_segments(RowTokenizer(tokenizer), segments(("<s>Hi", False), (" Hello</s>", True)))
    assert row.input_ids[0] == tokenizer.bos_token_id
    assert row.input_ids.count(tokenizer.bos_token_id) == 1
    assert (row.input_ids[-1], row.supervised[-1]) == (tokenizer.eos_token_id, True)


def test_a_segment_that_no_token_fits_is_told(renderer: ChatRenderer) -> None:
    row = Segments(tuple(segments(("Hello wor", False), ("l", True), ("d.", False))), ORIGIN)
    with pytest.raises(RowError, match=r"rows.jsonl:7: no token lies wholly in trained segments"):
        tokenize_row(renderer, row)


@pytest.mark.parametrize("text", ["the world", "<s>the world", "the world</s>", "<s>the world</s>"])
def test_a_document_has_one_bos_and_one_eos(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    row = tokenize_text(tokenizer, text, tokenise=RowTokenizer(tokenizer), eos_id=tokenizer.eos_token_id)
    words = tokenizer("the world", add_special_tokens=False)["input_ids"]
    assert row.input_ids == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
    assert all(row.supervised)


def test_no_bos_where_the_tokenizer_puts_none(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("plain", None)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    row = tokenize_text(tokenizer, "the world", tokenise=RowTokenizer(tokenizer), eos_id=tokenizer.eos_token_id)
    assert tokenizer.bos_token_id not in row.input_ids
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no EOS token to end a document with") as raised:
        tokenize_text(tokenizer, "the world", tokenise=RowTokenizer(tokenizer), eos_id=tokenizer.eos_token_id)
    assert not isinstance(raised.value, RowError)


def test_tokens_are_taken_as_they_are(renderer: ChatRenderer) -> None:
    size = len(renderer.tokenizer)
    row = tokenize_row(renderer, TokenIds((1, 2, size - 1), (False, True, True), ORIGIN))
    assert (row.input_ids, row.supervised) == ([1, 2, size - 1], [False, True, True])
    for id in (size, 2**31 - 1):
        with pytest.raises(RowError, match=rf"rows.jsonl:7: input_ids\[1\] is {id}, which is no token"):
            tokenize_row(renderer, TokenIds((1, id), (True, True), ORIGIN))


# Files


def test_plain_text_files_are_documents_if_that_is_asked_for(tmp_path: Path, renderer: ChatRenderer) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffthe world\n日本".encode())
    (tmp_path / "b.md").write_text('{"text": "not JSON but a document"}')
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "one"}) + "\n" + json.dumps({"text": "two"}))
    source = SourceConfig(path=str(tmp_path), format="text")
    found = [(str(row.origin), row.segments[0].text) for row in read_source(source) if isinstance(row, Segments)]
    assert found == [
        (f"{tmp_path}/a.txt row 1", "the world\n日本"),
        (f"{tmp_path}/b.md row 1", '{"text": "not JSON but a document"}'),
        (f"{tmp_path}/c.jsonl:1", "one"),
        (f"{tmp_path}/c.jsonl:2", "two"),
    ]
    assert [str(row.origin) for row in read_source(SourceConfig(path=str(tmp_path)))] == [
        f"{tmp_path}/c.jsonl:1",
        f"{tmp_path}/c.jsonl:2",
    ]
    with pytest.raises(
        RowError, match=r"a.txt:1: malformed JSON.*\n  fix: set format: text if the file is one document"
    ):
        list(read_source(SourceConfig(path=str(tmp_path / "a.txt"))))
    (tmp_path / "a.txt").write_bytes("日本".encode("cp932"))
    with pytest.raises(RowError, match=r"a.txt row 1: byte 1 \(0x93\) is not UTF-8"):
        list(read_source(source))


def test_a_document_ends_with_the_own_eos_of_a_tokenizer_whose_template_is_built() -> None:
    """That template may end answers with another token, which becomes the tokenizer's EOS."""
    tokenizer = build_tokenizer("llama3", None)
    own = tokenizer.eos_token_id
    renderer = ChatRenderer(tokenizer, "llama3")
    assert tokenizer.eos_token_id != own
    assert tokenize_row(renderer, read({"text": "Hello world"})).input_ids[-1] == own
