"""Files are found, told apart by their content, and read to the last row or to a named fault."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.messages import Conversation
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError

ROW = {"instruction": "名前は？", "output": "太郎です。"}
TURNS = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*rows: object) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def read(path: Path | str, format: str = "auto") -> list[Conversation]:
    return list(read_source(SourceConfig.model_validate({"path": str(path), "format": format})))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.txt"])
def test_content_decides_not_the_extension(tmp_path: Path, name: str, mark: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(mark + lines(ROW, ROW) + b"\n")
    by_line = read(path)
    assert [str(row.origin) for row in by_line] == [f"{path}:1", f"{path}:2"]
    path.write_bytes(mark + b"\n  " + json.dumps([ROW, ROW], indent=2).encode())
    as_array = read(path)
    assert [str(row.origin) for row in as_array] == [f"{path} row 1", f"{path} row 2"]
    assert [row.messages for row in by_line] == [row.messages for row in as_array]
    assert by_line[0].messages[1].content == "太郎です。"


def test_blank_lines_count_but_hold_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n" + lines(ROW) + b"\r\n\r\n" + lines(ROW) + b"\n\n")
    assert [row.origin.row for row in read(path)] == [2, 4]


def test_a_glob_is_read_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines({**ROW, "output": name}))
    assert [row.messages[-1].content for row in read(tmp_path / "*.jsonl")] == ["a", "b", "c"]


def test_a_file_whose_name_looks_like_a_glob_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(lines(ROW))
    assert len(read(tmp_path / "a[1].jsonl")) == 1


@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"", "holds no row", "put rows into the file"),
        (b"\n \n", "holds no row", "put rows into the file"),
        (b"[]", "holds no row", "put rows into the file"),
        (lines(ROW) + b'\n{"instruction": "a" "output"}', ":2: malformed JSON at line 2 column 21", "on each line"),
        (b'[\n{"instruction": "a", "output": "b"},\n{"a" 2}]', ": malformed JSON at line 3 column 6", "one JSON array"),
        (json.dumps(ROW, indent=1).encode(), ":1: malformed JSON at line 1 column 2", "one whole JSON object"),
        (lines(ROW, [1]), ":2: the row is a list, not an object", "as a JSON object"),
        (b"[null]", " row 1: the row is null, not an object", "as a JSON object"),
        (lines(ROW) + b"\n" + '{"a": "é"}'.encode("latin-1"), ":2: byte 8 (0xe9) is not UTF-8", "iconv"),
        ("[]".encode("utf-16"), "is UTF-16, not UTF-8", "iconv -f UTF-16"),
        (lines(ROW, TURNS), ":2: the row has the messages layout, but the first row", "two sources"),
    ],
)
def test_faults_of_a_file(tmp_path: Path, content: bytes, what: str, fix: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(path)
    assert raised.value.what.startswith(str(path))
    assert what in raised.value.what
    assert fix in raised.value.fix
    assert raised.value.exit_code == 4


def test_rows_before_a_fault_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROW) + b"\n{")
    rows = read_source(SourceConfig(path=str(path)))
    assert next(rows).origin.row == 1
    with pytest.raises(DataError, match=":2: malformed"):
        next(rows)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "support.jsonl").write_bytes(lines(ROW))
    with pytest.raises(DataError, match=r"suport.jsonl does not exist\n  fix: did you mean .*support.jsonl\?"):
        read(tmp_path / "suport.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        read(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "*.json")
    assert len(read(tmp_path)) == 1


def test_a_given_format_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"input": "x", "output": "y", "instruction": "z"}))
    assert read(tmp_path / "a.jsonl")[0].messages[0].content == "z\nx"
    assert read(tmp_path / "a.jsonl", "input_output")[0].messages[0].content == "x"
