"""Whatever a file holds, each row ends as a valid row or as an error that names it; nothing else, and nothing is lost."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data import text_rows
from sft_dist.data.chat_template import ChatRenderer
from sft_dist.data.formats import LAYOUTS
from sft_dist.data.literal_rows import tokenize_row
from sft_dist.data.messages import Conversation, Origin, Row, Segments, TokenIds
from sft_dist.data.sources import RowParser, read_raw, read_source
from sft_dist.errors import DataError, RowError
from tests.helpers.templates import CHATML, build_tokenizer

# The same examples in every run.
fuzzed = settings(derandomize=True, database=None, deadline=None, max_examples=300)

ORIGIN = Origin("rows.jsonl", 7)
LONGEST_MESSAGE = 1500
GOOD = b'{"prompt": "Hi", "completion": "Hello."}'

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"city": "京都", "days": [1, 2]}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["q", "r"], ["t", "u"]]},
    "sharegpt": {
        "system": "s",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b", "weight": 1, "train": True},
            {"from": "function_call", "value": json.dumps({"name": "f", "arguments": "{}"})},
            {"from": "observation", "value": {"t": [20]}, "name": "f"},
            {"from": "gpt", "value": "c"},
        ],
    },
    "messages": {
        "tools": TOOLS,
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0, "train": False},
            {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f"},
            {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": '{"a": null}'}},
            {"role": "function", "content": "y"},
            {"role": "assistant", "content": "c", "reasoning_content": "hm", "weight": 1},
        ],
    },
    "prompt_completion": {
        "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "completion": [{"role": "assistant", "content": "d"}],
        "tools": TOOLS,
    },
    "input_output": {"input": "a", "output": "b", "system": "s"},
    "segments": {"segments": [{"text": "a ", "train": False}, {"text": "b c", "label": True, "train": True}]},
    "text": {"text": "a b c"},
    "tokens": {
        "input_ids": [5, 6, 7],
        "labels": [-100, 6, 7],
        "loss_mask": [0, 1, 1],
        "completion_mask": [False, True, True],
        "attention_mask": [1, 1, 1],
    },
}  # fmt: skip

INSTEAD: list[Any] = [
    None, True, False, 0, 1, -1, 2.5, 1e300, float("nan"), float("inf"), 10**400, "", "x", "[", "{}", "null", "\ud800",
    "\0", [], {}, [None], [[]], [{}], {"a": None}, {"": "\udfff"}, [1, "2"],
]  # fmt: skip


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values inside ``value``, at any depth, itself too."""
    yield way
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*way, key))


def replaced(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    if isinstance(value, dict):
        return {key: replaced(part, way[1:], new) if key == way[0] else part for key, part in value.items()}
    return [replaced(part, way[1:], new) if index == way[0] else part for index, part in enumerate(value)]


def removed(value: Any, way: tuple[Any, ...]) -> Any:
    *parents, last = way
    parent = value
    for key in parents:
        parent = parent[key]
    less = (
        {k: v for k, v in parent.items() if k != last}
        if isinstance(parent, dict)
        else parent[:last] + parent[last + 1 :]
    )
    return replaced(value, tuple(parents), less)


def check_row(row: Row) -> None:
    """A row that everything after the reading can take as it is."""
    if isinstance(row, TokenIds):
        assert len(row.input_ids) == len(row.trained) > 1
        assert all(type(id) is int and 0 <= id < 2**31 for id in row.input_ids)
        assert all(type(trained) is bool for trained in row.trained)
        assert any(row.trained[1:])
    elif isinstance(row, Segments):
        assert any(segment.trained and segment.text for segment in row.segments)
        for segment in row.segments:
            assert type(segment.trained) is bool
            segment.text.encode()
    else:
        assert isinstance(row, Conversation)
        assert any(message.role == "assistant" and message.trained for message in row.messages)
        for message in row.messages:
            assert message.role in ("system", "user", "assistant", "tool")
            assert type(message.trained) is bool
            for text in (message.content, message.name or "", message.tool_call_id or "", message.reasoning or ""):
                text.encode()
            for call in message.tool_calls:
                call.name.encode()
                json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False).encode()
        json.dumps([dict(tool) for tool in row.tools], allow_nan=False, ensure_ascii=False).encode()


def check_error(error: DataError, place: str) -> None:
    for text in (error.what, error.fix):
        text.encode()
        assert text
        assert text.isprintable(), "one line"
        assert len(text) < LONGEST_MESSAGE
    assert error.what.startswith(place), error.what


def outcome(parse: Callable[[], Row]) -> Row | RowError:
    try:
        row = parse()
    except RowError as error:
        check_error(error, "rows.jsonl:7")
        return error
    check_row(row)
    return row


def as_line(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_value_in_any_place_of_a_row(layout: str) -> None:
    """All of them, under the layout that is given and under the one that the keys show."""
    row = ROWS[layout]
    given, seen = RowParser(layout, None, {}), RowParser(layout, ORIGIN, {})
    assert not isinstance(outcome(lambda: seen.parse(as_line(row), ORIGIN)), RowError), "the row itself is good"
    ways = list(places(row))
    changed = [replaced(row, way, new) for way in ways for new in INSTEAD]
    changed += [removed(row, way) for way in ways if way]
    outcomes = [outcome(lambda p=p, r=r: p.parse(as_line(r), ORIGIN)) for r in changed for p in (given, seen)]  # type: ignore[misc]
    assert len(outcomes) > 50
    assert any(isinstance(each, RowError) for each in outcomes)


ANY = st.recursive(
    st.sampled_from(INSTEAD[:18]) | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(
        ["role", "from", "content", "value", "name", "arguments", "tools", "text", "type", "train", "weight", "function"]
    ), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, Any]:
    """A layout, and a row of it in which some values are others."""
    layout = draw(st.sampled_from(sorted(ROWS)))
    row: Any = ROWS[layout]
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(list(places(row))))
        row = replaced(row, way, draw(ANY))
    return layout, row


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer(build_tokenizer("chatml", CHATML))


@fuzzed
@given(mutated())
def test_several_values_changed_and_then_tokenised(renderer: ChatRenderer, case: tuple[str, Any]) -> None:
    layout, row = case
    read = outcome(lambda: RowParser(layout, None, {}).parse(as_line(row), ORIGIN))
    if isinstance(read, RowError):
        return
    try:
        tokens = tokenize_row(renderer, read)
    except RowError as error:
        check_error(error, "rows.jsonl:7")
    else:
        assert len(tokens.input_ids) == len(tokens.supervised)


def read(path: Path, **keys: Any) -> tuple[list[Row], list[RowError]]:
    errors: list[RowError] = []
    rows = list(read_source(SourceConfig(path=str(path), **keys), on_rejected=errors.append))
    for row in rows:
        check_row(row)
    for error in errors:
        check_error(error, str(path))
    return rows, errors


def read_or_refused(path: Path, content: bytes, **keys: Any) -> int | None:
    """How many rows were read or rejected; None where an error names the file."""
    path.write_bytes(content)
    refused: DataError | None = None
    try:
        rows, errors = read(path, **keys)
    except DataError as error:
        refused = error
    if refused is None:
        return len(rows) + len(errors)
    assert not isinstance(refused, RowError)
    check_error(refused, str(path))
    return None


FRAGMENTS = [
    b'{"prompt": "', b'"completion": "b"}', GOOD, b'"', b"{", b"}", b"[", b"]", b",", b":", b"\n", b"\r\n", b" ", b"\0",
    b"\\u0000", b"\\ud83d", b"\\", b"\xef\xbb\xbf", b"\xff\xfe", b"\x82\xa0", b"null", b"NaN", b"-Infinity", b"1e999",
    b"9" * 4301, b"[" * 2000, b'{"a":' * 2000, b"\x1f\x8b", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x28\xb5\x2f\xfd",
    "語".encode(), b"\xe2\x80\xa8", b"\x1a", b"\x0b", b"\x85",
]  # fmt: skip


@settings(fuzzed, max_examples=150)
@given(content=st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=6), max_size=12).map(b"".join))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = GOOD + b"\n" + content
    assert read_or_refused(folder / "fuzzed.jsonl", lines) == sum(1 for line in lines.split(b"\n") if line.strip())
    read_or_refused(folder / "fuzzed", content)
    read_or_refused(folder / "fuzzed.csv", content)
    read_or_refused(folder / "fuzzed.txt", content, format="text")


@fuzzed
@given(
    where=st.integers(0, 10_000),
    new=st.binary(min_size=1, max_size=4),
    kind=st.sampled_from(["parquet", "arrow", "gz"]),
)
def test_damaged_binary_files(tmp_path_factory: pytest.TempPathFactory, where: int, new: bytes, kind: str) -> None:
    content = bytearray(BINARY[kind])
    where %= len(content)
    content[where : where + len(new)] = new
    read_or_refused(tmp_path_factory.getbasetemp() / "damaged", bytes(content))


def _binary() -> dict[str, bytes]:
    table = pa.Table.from_pylist([{"prompt": f"Hi {n}", "completion": "Hello"} for n in range(50)])
    parquet, arrow = pa.BufferOutputStream(), pa.BufferOutputStream()
    pyarrow.parquet.write_table(table, parquet)
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table)
    lines = b"\n".join(as_line(row) for row in table.to_pylist())
    return {
        "parquet": parquet.getvalue().to_pybytes(),
        "arrow": arrow.getvalue().to_pybytes(),
        "gz": gzip.compress(lines),
    }


BINARY = _binary()


# What has a name


def deep(levels: int, inside: str = "") -> bytes:
    return b'{"prompt": "a", "completion": "b", "x": ' + b"[" * levels + inside.encode() + b"]" * levels + b"}"


def asks(**arguments: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [
        {"function": {"name": "f", "arguments": arguments}}]}]}  # fmt: skip


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"\0", "malformed JSON"),
        (b'{"prompt": "a\0", "completion": "b"}', "Invalid control character"),
        (b'{"prompt": "a", "completion": "\\ud83d"}', "completion holds half a surrogate pair at character 1"),
        (b'{"\\ud83d": "a"}', r"no known layout has these keys: \ud83d"),
        (b'{"' + b"k" * 10_000 + b'": "a", "two\\nlines": 1}', r"kkk..., two\nlines"),
        (b"{" + b",".join(b'"k%d": 1' % n for n in range(10_000)) + b"}", "k10, k11, ..."),
        ('{"prompt": "東京"}'.encode("cp932"), "is not UTF-8"),
        (deep(100_000), "JSON nested too deep to be read"),
        (b"[" * 100_000, "JSON nested too deep to be read"),
        (as_line(asks(a=nested(101))), "arguments is nested more than 100 levels deep"),
        (as_line(asks(a=float("nan"))), "arguments holds NaN or Infinity"),
        (as_line({**asks(a=1), "tools": '[{"name": "f", "parameters": {"maximum": 1e999}}]'}), "holds NaN or Infinity"),
        (as_line(asks(a="\ud800")), "arguments holds half a surrogate pair"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "an object has the key 'prompt' twice"),
        (as_line({"messages": asks(a=1)["messages"], "tools": '[{"name": "f", "name": "g"}]'}), "the key 'name' twice"),
        (b'{"messages": [{"role": "' + b"w" * 10_000 + b'", "content": "a"}]}', "unknown role 'www"),
        (as_line({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": nested(900)}]}),
         "weight is a list"),
        (as_line({"messages": [{"role": "assistant", "content": "b", "function_call": "f()"}]}), "function_call is a string"),
    ],
)  # fmt: skip
def test_what_a_line_may_be(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "rows.jsonl"
    keys = {"format": "prompt_completion"} if line.startswith(b'{"prompt') else {}
    path.write_bytes((GOOD if keys else as_line(asks(a=1))) + b"\n" + line + b"\n")
    rows, (error,) = read(path, **keys)
    assert len(rows) == 1
    assert error.what.startswith(f"{path}:2: ")
    assert what in error.what


@pytest.mark.parametrize(
    "line",
    [
        b'{"prompt": "a\\u0000", "completion": "b", "score": NaN}',
        b'{"prompt": "a", "completion": "b", "x": [1e999, -Infinity, 123456789012345678901234567890]}',
        deep(400),
        b"\xef\xbb\xbf" + GOOD,
        b"  " + GOOD + b"  \r",
        '{"prompt": "\\ud83d\\ude00", "completion": "b\u2028\u0085"}'.encode(),
    ],
)
def test_what_is_odd_and_no_fault(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line)
    assert len(read(tmp_path / "rows.jsonl")[0]) == 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("opening", ["", "["])
def test_other_encodings_of_unicode_are_named(tmp_path: Path, encoding: str, opening: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes((opening + GOOD.decode()).encode(encoding))
    with pytest.raises(DataError, match=f"is {encoding.upper()[:6]}.*, not UTF-8\n  fix: convert it: iconv -f UTF-"):
        read(tmp_path / "rows.jsonl")


def test_a_file_in_cp932(tmp_path: Path) -> None:
    rows = '{"prompt": "東京", "completion": "首都"}\n'
    for name, content in (("a.jsonl", rows), ("a.json", f"[{rows}]"), ("a.csv", "prompt,completion\n東京,首都\n")):
        (tmp_path / name).write_bytes(content.encode("cp932"))
        with pytest.raises(DataError, match=r"0x.. *\)? is not UTF-8.*|not UTF-8") as raised:
            read(tmp_path / name)
        assert "iconv -f CP932" in raised.value.fix


def test_explicit_nulls_of_json_stay_and_those_that_a_table_fills_in_go(tmp_path: Path) -> None:
    """Also three levels down, and where a column holds the arguments as JSON text."""
    rows = [asks(a={"b": [{"c": 1, "d": None}]}), asks(a={"b": [{"c": 2}], "e": "x"})]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(as_line, rows)))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    as_text = [asks() for _ in rows]
    for row, text in zip(as_text, rows, strict=True):
        arguments = text["messages"][1]["tool_calls"][0]["function"]["arguments"]
        row["messages"][1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments)
    pyarrow.parquet.write_table(pa.Table.from_pylist(as_text), tmp_path / "text.parquet")

    def arguments(name: str) -> list[Any]:
        found = read(tmp_path / name)[0]
        return [dict(row.messages[1].tool_calls[0].arguments) for row in found if isinstance(row, Conversation)]

    explicit = [{"a": {"b": [{"c": 1, "d": None}]}}, {"a": {"b": [{"c": 2}], "e": "x"}}]
    assert arguments("rows.jsonl") == arguments("text.parquet") == explicit
    assert arguments("rows.parquet") == [{"a": {"b": [{"c": 1}]}}, {"a": {"b": [{"c": 2}], "e": "x"}}]


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    """A column may hold dates and bytes."""
    table = pa.Table.from_pylist([asks(a=pa.scalar(0, pa.timestamp("s")).as_py()), asks(a=None)])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    rows, (error,) = read(tmp_path / "rows.parquet")
    assert len(rows) == 1
    assert "arguments holds a value that JSON does not have" in error.what


# Size

MIB_100 = 100 * (1 << 20)


def compressed(*parts: tuple[bytes, int]) -> bytes:
    """Each part so many times, as a Zstandard file, so that 100 MiB cost no disk."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        for part, count in parts:
            for _ in range(count // 1024):
                stream.write(part * 1024)
            stream.write(part * (count % 1024))
    return bytes(sink.getvalue().to_pybytes())


@pytest.mark.parametrize(
    ("parts", "num_rows", "what"),
    [
        ([(b'{"prompt": "a", "completion": "', 1), (b"b", MIB_100), (b'"}\n' + GOOD, 1)], 2, None),
        ([(GOOD + b'\n{"prompt": "a", "completion": "', 1), (b"b", MIB_100)], 1, ":2: malformed JSON"),
        ([(GOOD + b"\n", 1), (b"[" * 16, MIB_100 // 16)], 1, ":2: JSON nested too deep"),
        ([(b" " * 1023 + b"\n", MIB_100 // 1024), (GOOD, 1)], 1, None),
        ([(GOOD + b'\n{"', 1), (b"k", MIB_100), (b'": 1}', 1)], 1, ":2: "),
    ],
)
def test_a_row_of_100_mib_takes_seconds(
    tmp_path: Path, parts: list[tuple[bytes, int]], num_rows: int, what: str | None
) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(compressed(*parts))
    assert path.stat().st_size < 1 << 20
    started = time.perf_counter()
    rows, errors = read(path)
    assert time.perf_counter() - started < 20
    assert len(rows) == num_rows
    assert [error.what.startswith(f"{path}{what}") for error in errors] == [True] * (what is not None)


def test_a_row_that_is_longer_than_any_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_rows, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "rows.jsonl"
    for length in (1000, 1001, 5000):
        long = b'{"prompt": "a", "completion": "' + b"b" * length + b'"}'
        path.write_bytes(b"\n".join([GOOD, long, GOOD]))
        rows, (error,) = read(path)
        assert [row.origin.row for row in rows] == [1, 3]
        assert error.what == f"{path}:2: the row has 1,000 bytes or more"
    path = tmp_path / "book.txt"
    path.write_bytes(b"b" * 1000)
    with pytest.raises(DataError, match="the row has 1,000 bytes or more"):
        list(read_source(SourceConfig(path=str(path), format="text")))
    assert len(list(read_raw(str(path), documents=True))) == 1
