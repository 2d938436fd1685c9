"""Files of every kind that data comes in: compressed, with columns, in folders and behind URLs."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data import tables
from sft_dist.data.files import ending, find_files
from sft_dist.data.messages import Conversation
from sft_dist.data.sources import read_rows, read_source
from sft_dist.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"instruction": "東京は？", "output": '日本の首都です。\n"本当"に、です。'},
    {"instruction": "1+1", "output": "2"},
    {"instruction": "a,b\tc", "output": "改行\nと, 区切り"},
]
CALLS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "天気"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "京都"}}}],
            },
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "what time"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": 9}}}],
            },
        ]
    },
]


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def csv(rows: list[dict[str, Any]], separator: str = ",") -> bytes:
    import csv as python_csv
    import io

    text = io.StringIO(newline="")
    writer = python_csv.DictWriter(text, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue().to_pybytes())


def arrow(rows: list[dict[str, Any]], opened: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with opened(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


KINDS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.csv": csv,
    "rows.tsv": partial(csv, separator="\t"),
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "stream.arrow": partial(arrow, opened=pa.ipc.new_stream),
}


def contents(path: Path | str, **source: Any) -> list[tuple[str, ...]]:
    read: Iterator[Conversation] = read_source(SourceConfig(path=str(path), **source))
    return [tuple(message.content for message in row.messages) for row in read]


EXPECTED = [(row["instruction"], row["output"]) for row in ROWS]


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str, packed: str) -> None:
    wrap = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[packed]
    path = tmp_path / (name + packed)
    path.write_bytes(wrap(KINDS[name](ROWS)))
    assert contents(path) == EXPECTED


def test_content_decides_what_a_file_is(tmp_path: Path) -> None:
    """Compression, Parquet and Arrow have marks of their own; a wrong name does not matter."""
    for name, content in {"a": gzip.compress(jsonl(ROWS)), "b.json": parquet(ROWS), "c.gz": arrow(ROWS)}.items():
        (tmp_path / name).write_bytes(content)
        assert contents(tmp_path / name) == EXPECTED


@pytest.mark.parametrize("kind", ["rows.parquet", "rows.arrow", "stream.arrow"])
def test_keys_that_a_row_lacks_do_not_become_null(tmp_path: Path, kind: str) -> None:
    """A column of structs has every key of every row; ``{"city": "京都", "zone": null}`` would be trained as a call."""
    path = tmp_path / kind
    path.write_bytes(KINDS[kind](CALLS))
    rows = list(read_source(SourceConfig(path=str(path))))
    assert [dict(row.messages[1].tool_calls[0].arguments) for row in rows] == [{"city": "京都"}, {"zone": 9}]


def test_many_rows_are_read_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    rows = [{"input": f"{n}", "output": "x"} for n in range(40)]
    for name in ("rows.parquet", "rows.arrow", "stream.arrow"):
        (tmp_path / name).write_bytes(KINDS[name](rows))
        assert [row["input"] for row, _ in read_rows(str(tmp_path / name))] == [str(n) for n in range(40)]
        assert [origin.row for _, origin in read_rows(str(tmp_path / name))] == list(range(1, 41))


def test_columns_are_called_as_the_layout_calls_them(tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_bytes(csv([{"id": "7", "question": "Q", "answer": "A", "input": "not this"}]))
    assert contents(path, columns={"prompt": "question", "completion": "answer"}) == [("Q", "A")]
    assert contents(path, columns={"input": "question", "output": "answer"}) == [("Q", "A")]
    with pytest.raises(DataError, match=r"faq\.csv row 1: the row has no frage, which columns names \(keys: id, quest"):
        contents(path, columns={"prompt": "frage", "completion": "answer"})


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b"instruction,output\nx,y\nx,y,z\n", "a.csv row 2 (line 3) has 3 cells, and the first line names 2"),
        ("a.csv", b"instruction,,output\nx,y,z\n", "the first line names columns 'instruction', '', 'output'"),
        ("a.csv", b"input,input\nx,y\n", "the first line names columns 'input', 'input'"),
        ("a.csv", "input,output\nx,é\n".encode("latin-1"), "after row 0, byte 0xe9 is not UTF-8"),
        ("a.csv", b'input,output\nx,"y\n', "after row 0: unexpected end of data"),
        ("a.csv", b"input,output\n", "holds no row"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS) * 50)[:-30], "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(os.urandom(900))[:60] + b"\0" * 99, "cannot be read to its end"),
        ("a.jsonl.zst", zstd(jsonl(ROWS) * 50)[:-30], "a.jsonl.zst"),
        ("a.parquet", parquet(ROWS)[:-9], "damaged after row 0"),
        ("a.arrow", arrow(ROWS)[:-9], "damaged after row 0"),
        ("a.jsonl", b"[" * 200_000, "nested too deep"),
        ("a.jsonl", b'{"a": ' * 200_000, "nested too deep"),
        ("a.jsonl", b'{"input": "\0", "output": "y"}', "malformed JSON at line 1"),
    ],
)  # fmt: skip
def test_faults_name_the_file_and_the_row(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        contents(tmp_path / name)
    assert what in caught.value.what
    assert str(tmp_path / name) in caught.value.what


def test_types_that_json_lacks_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet([{"input": b"bytes", "output": "y"}]))
    with pytest.raises(DataError, match="input is of type bytes, not a string"):
        contents(path)


def test_a_folder_stands_for_its_data_files(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a.csv.gz", "b/1.PARQUET", "README.md", ".hidden/x.jsonl", "b/_tmp.jsonl", "state.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl(ROWS))
    assert [os.path.relpath(file, tmp_path) for file in find_files(str(tmp_path))] == [
        "a.csv.gz",
        "b/1.PARQUET",
        "b/2.jsonl",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder without data files"):
        find_files(str(tmp_path / "empty"))


def test_endings() -> None:
    assert ending("rows.CSV.gz") == ".csv"
    assert ending("https://host/a.tsv?version=1.2") == ".tsv"
    assert ending("s3://bucket/a.jsonl.zst") == ".jsonl"


# URLs


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("name", KINDS)
def test_a_file_behind_a_url(tmp_path: Path, server: str, name: str) -> None:
    (tmp_path / name).write_bytes(KINDS[name](ROWS))
    assert contents(f"{server}/{name}") == EXPECTED
    origin = next(read_rows(f"{server}/{name}"))[1]
    assert str(origin).startswith(f"{server}/{name}")


def test_urls_that_lead_nowhere(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DataError, match=r"there is no file at http://.*/absent\.jsonl"):
        find_files(f"{server}/absent.jsonl")
    with pytest.raises(DataError, match="ftpx:// is no storage that is known"):
        find_files("ftpx://host/rows.jsonl")
    with pytest.raises(DataError, match=r"s3:// needs a package\n  fix: pip install s3fs"):
        find_files("s3://bucket/rows.jsonl")


def test_a_store_is_listed() -> None:
    store = fsspec.filesystem("memory")
    try:
        for name in ("/set/b.jsonl", "/set/a.csv", "/set/deep/c.jsonl", "/set/readme.md"):
            store.pipe(name, (csv if name.endswith("csv") else jsonl)(ROWS))
        assert find_files("memory://set/*.jsonl") == ["memory:///set/b.jsonl"]
        assert find_files("memory://set") == [
            "memory:///set/a.csv",
            "memory:///set/b.jsonl",
            "memory:///set/deep/c.jsonl",
        ]
        assert contents("memory://set") == EXPECTED * 3
    finally:
        store.rm("/set", recursive=True)
