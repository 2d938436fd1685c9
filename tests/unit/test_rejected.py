"""Rows that cannot be used: the first one ends the run, or they are left out, counted and told."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.data_schema import DataConfig, SourceConfig
from sft_dist.data.cache import Cache
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.prepare import prepare_sets
from sft_dist.data.prepared import open_prepared
from sft_dist.data.rejected import rejections
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError, RowError
from sft_dist.train.data import told_of_rows
from tests.helpers.templates import MISTRAL, build_tokenizer

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

# Lines of JSONL and what is said of them.
BAD: list[tuple[bytes, str]] = [
    (b'{"messages": [', "malformed JSON at line"),
    (b'{"messages": "\xe9"}', "byte 15 (0xe9) is not UTF-8"),
    (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON nested too deep to be read"),
    (b"7", "the row is a number, not an object"),
    (b'{"id": 1}', "no known layout has these keys: id"),
    (json.dumps({"messages": [{"role": "wizard", "content": "x"}]}).encode(), "unknown role 'wizard'"),
    (json.dumps({"messages": [*GOOD["messages"], {"role": "user", "content": "\ud83d"}]}).encode(), "half a surrogate"),
    (b'{"messages": [], "messages": []}', "an object has the key 'messages' twice"),
    (json.dumps({"instruction": "a", "output": "b"}).encode(), "the row has the alpaca layout, but the first row"),
]


def line(row: object = GOOD) -> bytes:
    return json.dumps(row).encode()


def read(path: Path, **keys: Any) -> tuple[list[int], list[RowError]]:
    """Places of the rows, and the errors of those that are left out."""
    errors: list[RowError] = []
    source = SourceConfig(path=str(path), **keys)
    return [row.origin.row for row in read_source(source, on_rejected=errors.append)], errors


def test_each_bad_line_is_left_out_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(part for bad, _ in BAD for part in (bad, line())))
    good, errors = read(path)
    assert good == list(range(2, 2 * len(BAD) + 1, 2))
    assert len(errors) == len(BAD)
    for number, (error, (_, what)) in enumerate(zip(errors, BAD, strict=True)):
        assert error.what.startswith(f"{path}:{2 * number + 1}: ")
        assert what in error.what
        assert pickle.loads(pickle.dumps(error)).what == error.what


@pytest.mark.parametrize(("bad", "what"), BAD)
def test_the_first_bad_line_ends_the_run_otherwise(tmp_path: Path, bad: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line() + b"\n" + bad + b"\n" + line())
    rows = read_source(SourceConfig(path=str(path)))
    assert next(rows).origin.row == 1
    with pytest.raises(RowError) as raised:
        next(rows)
    assert raised.value.what.startswith(f"{path}:2: ")
    assert what in raised.value.what


def test_elements_of_an_array_and_rows_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b"[" + line() + b', {"a": {"b": 1, "b": 2}, "c": [1]}, 7, {"n": ' + b"9" * 5000 + b"}, " + line() + b"]"
    )
    good, errors = read(tmp_path / "a.json")
    assert good == [1, 5]
    assert [error.what.removeprefix(f"{tmp_path}/a.json ") for error in errors] == [
        "row 2: an object has the key 'b' twice",
        "row 3: the row is a number, not an object",
        "row 4: a number of thousands of digits",
    ]
    (tmp_path / "b.csv").write_text("prompt,completion\na,b\na,b,c\n\na\nc,d\n")
    good, errors = read(tmp_path / "b.csv")
    assert good == [1, 4]
    assert [error.what.removeprefix(f"{tmp_path}/b.csv ") for error in errors] == [
        "row 2 (line 3) has 3 cells, and the first line names 2",
        "row 3 (line 5) has 1 cells, and the first line names 2",
    ]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.json", b"[" + line() + b", " + line()[:-5], "malformed JSON at line 1"),
        ("a.json", b"[" + line() + b"] x", "malformed JSON at line 1 column 97: Extra data"),
        ("a.json", b'["\xe9"]', "byte 3 (0xe9) is not UTF-8"),
        ("a.jsonl", gzip.compress(line() * 100)[:-30], "cannot be read to its end"),
        ("a.parquet", b"PAR1" + bytes(100), "damaged after row 0"),
        ("a.csv", b"prompt,completion\na,b\n\xe9,c", "after row 0, byte 0xe9 is not UTF-8"),
        ("a.jsonl", b"", "holds no row"),
    ],
)
def test_damage_of_a_whole_file_is_an_error_all_the_same(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(tmp_path / name)
    assert not isinstance(raised.value, RowError)
    assert raised.value.what.startswith(str(tmp_path / name))
    assert what in raised.value.what


def test_a_source_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(bad for bad, _ in BAD[:-1]))
    for keys in ({}, {"format": "messages"}):
        with pytest.raises(DataError, match=r"none of 8 rows can be trained on; the first: .*:1: malformed") as raised:
            read(path, **keys)
        assert not isinstance(raised.value, RowError)
        assert "one whole JSON object on each line" in raised.value.fix


def data(tmp_path: Path, *rows: object, **keys: Any) -> DataConfig:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(row if isinstance(row, bytes) else line(row) for row in rows))
    return DataConfig.model_validate({"train": [{"path": str(tmp_path / "rows.jsonl")}], "packing": "none", **keys})


def load() -> ChatRenderer:
    """Its template refuses two questions in a row."""
    return ChatRenderer(build_tokenizer("mistral", MISTRAL))


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return load()


def prepare(tmp_path: Path, renderer: ChatRenderer, config: DataConfig, **more: Any) -> Path:
    folder = prepare_sets(config, Cache(tmp_path / "cache", renderer, load, **more)).train
    assert folder is not None
    return folder


REFUSED = {"messages": [{"role": "user", "content": "Hi"}, *GOOD["messages"]]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_rows_that_the_template_refuses_are_counted_with_those_that_cannot_be_read(
    tmp_path: Path, renderer: ChatRenderer, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft_dist.data.prepare.MIN_BYTES_FOR_WORKERS", 0)
    config = data(tmp_path, GOOD, b"{", REFUSED, GOOD, on_bad_row="skip")
    folder = prepare(tmp_path, renderer, config, num_workers=num_workers)
    assert open_prepared(folder).num_rows == 2
    head, *told = told_of_rows(folder, config)
    assert head == "2 rows rejected and left out (data.on_bad_row: skip)"
    assert f"{tmp_path}/rows.jsonl:2: malformed JSON" in told[0]
    assert f"{tmp_path}/rows.jsonl:3: the chat template" in told[1]
    with pytest.raises(RowError, match=r"rows.jsonl:2: malformed"):
        prepare(tmp_path, renderer, config.model_copy(update={"on_bad_row": "error"}), num_workers=num_workers)
    config = data(tmp_path, GOOD, REFUSED, GOOD)
    with pytest.raises(RowError, match=r"rows.jsonl:2: the chat template"):
        prepare(tmp_path, renderer, config, num_workers=num_workers)


def test_all_rows_rejected_and_over_long_ones(tmp_path: Path, renderer: ChatRenderer) -> None:
    config = data(tmp_path, REFUSED, REFUSED, on_bad_row="skip")
    for _ in range(2):  # nothing of it is taken for prepared
        with pytest.raises(
            DataError, match=r"rows.jsonl: none of 2 rows can be trained on; the first: .*rows.jsonl:1: "
        ):
            prepare(tmp_path, renderer, config)
    # data.over_length has a setting of its own for these.
    config = data(tmp_path, GOOD, on_bad_row="skip", max_seq_len=8)
    with pytest.raises(DataError, match=r"more than data.max_seq_len=8") as raised:
        prepare(tmp_path, renderer, config)
    assert not isinstance(raised.value, RowError)


def test_all_kinds_of_rows_are_prepared_without_a_template(tmp_path: Path) -> None:
    tokenizer = build_tokenizer("plain", None)
    rows = {
        "segments": {"segments": [{"text": "Hello", "train": False}, {"text": " world", "train": True}]},
        "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        "text": {"text": "Hello world"},
    }
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_bytes(line(row))
    (tmp_path / "notes.txt").write_text("hello there")
    sources = [*({"path": str(tmp_path / f"{name}.jsonl")} for name in rows),
               {"path": str(tmp_path / "notes.txt"), "format": "text"}]  # fmt: skip
    config = DataConfig.model_validate({"train": sources, "packing": "none", "on_bad_row": "skip"})
    found = open_prepared(prepare(tmp_path, ChatRenderer(tokenizer), config))
    hello, world = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hello", " world"))
    there = tokenizer("hello there", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert [[part.tolist() for part in found.row(number)] for number in range(4)] == [
        [[*hello, *world], [0] * len(hello) + [1] * len(world)],
        [[5, 6, 7], [0, 1, 1]],
        [[bos, *hello, *world, eos], [1] * (len(hello) + len(world) + 2)],
        [[bos, *there, eos], [1] * (len(there) + 2)],
    ]
    split = DataConfig.model_validate({**config.model_dump(), "max_seq_len": 8, "over_length": "split"})
    (tmp_path / "notes.txt").write_text("hello there " * 20)
    found = open_prepared(prepare(tmp_path, ChatRenderer(tokenizer), split))
    ids = [id for number in range(3, found.num_rows) for id in found.row(number)[0].tolist()]
    assert ids == [bos, *tokenizer("hello there " * 20, add_special_tokens=False)["input_ids"], eos]


def test_templates_of_a_source_are_for_conversations(tmp_path: Path, renderer: ChatRenderer) -> None:
    config = data(tmp_path, {"text": "Hello world"}, on_bad_row="skip")
    source = config.train[0].model_copy(update={"templates": ["Answer: {prompt}"]})
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row has no question that templates"):
        prepare(tmp_path, renderer, config.model_copy(update={"train": [source]}))


def test_only_the_first_rows_are_told() -> None:
    assert rejections(0, []) == []
    assert rejections(1, ["rows.jsonl:1: bad"])[0].startswith("1 row rejected")
    assert rejections(7, [f"rows.jsonl:{number}: bad" for number in range(6)]) == [
        "7 rows rejected and left out (data.on_bad_row: skip)",
        *(f"rejected: rows.jsonl:{number}: bad" for number in range(5)),
        "... and 2 more",
    ]
