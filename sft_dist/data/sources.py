"""Read the rows of files, one by one; every fault is named by file and row.

What a file is, is decided by its content: compression, Parquet and Arrow by their first bytes, ``[`` opens a JSON
array, anything else is read line by line as JSON. CSV and TSV have no mark of their own and go by their names. All are
streamed, so a file larger than memory can be read, but for a JSON array, which gives no way to stop inside it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from sft_dist.config.schema import SourceConfig
from sft_dist.data import formats
from sft_dist.data.fields import Fields, kind
from sft_dist.data.files import ending, find_files, open_file, read_ahead
from sft_dist.data.messages import Conversation, Origin
from sft_dist.data.tables import ARROW, ARROW_STREAM, PARQUET, read_columns, read_csv
from sft_dist.errors import DataError

_WRONG_BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

SEPARATORS = {".csv": ",", ".tsv": "\t"}

LONGEST_MARK = max(map(len, (PARQUET, ARROW, ARROW_STREAM)))
BLANK = b" \t\r\n" + codecs.BOM_UTF8

Raw = Any
"""A row before it is parsed: bytes are a line of JSON, anything else is its value."""

TOO_DEEP = "write the row with less nesting; no layout has more than a few levels"


def read_source(source: SourceConfig) -> Iterator[Conversation]:
    """Yield the conversations of ``source``, files in sorted order, rows in file order.

    Raises:
        DataError: a file is missing, empty or not JSON, or a row cannot be trained on.
    """
    files = find_files(source.path)
    parser = parser_of(source, files)
    for path in files:
        for raw, origin in read_raw(path):
            yield parser.parse(raw, origin)


@dataclass(frozen=True)
class RowParser:
    """Reads the rows of one source.

    Args:
        layout: of every row.
        recognised: the row by which it was recognised; None: the configuration says it.
        columns: what the files call the keys of the layout.
    """

    layout: str
    recognised: Origin | None
    columns: Mapping[str, str]

    def parse(self, raw: Raw, origin: Origin) -> Conversation:
        """Reads a row as ``read_raw`` gives it. Raises ``DataError``."""
        row = _renamed(parse_row(raw, origin), self.columns, origin)
        if self.recognised is not None:
            found = formats.recognise(row, origin)
            if found != self.layout:
                first = f"the first row ({self.recognised}) has {self.layout}"
                raise DataError(
                    f"{origin}: the row has the {found} layout, but {first}",
                    fix=f"list {found} and {self.layout} rows as two sources of data.train, one file each",
                )
        return formats.parse(row, origin, self.layout)


def parser_of(source: SourceConfig, files: Sequence[str]) -> RowParser:
    """The parser of a source's rows.

    Under ``auto`` the first row decides the layout and every later row, of every file of a glob, must have it: a mixed
    source is more often a mistake than a wish, and rows read by the wrong rules would be trained on in silence.
    """
    if source.format != "auto":
        return RowParser(source.format, None, source.columns)
    raw, origin = next(read_raw(files[0]))
    row = _renamed(parse_row(raw, origin), source.columns, origin)
    return RowParser(formats.recognise(row, origin), origin, source.columns)


def _renamed(row: dict[str, Any], columns: Mapping[str, str], origin: Origin) -> dict[str, Any]:
    """The row with the keys that a layout knows, where ``columns`` says what the file calls them."""
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise Fields(row, origin).error(
            f"the row has no {', '.join(missing)}, which columns names (keys: {', '.join(row) or 'none'})",
            fix="correct columns of the source, or remove it",
        )
    theirs = set(columns.values()) | columns.keys()
    return {key: value for key, value in row.items() if key not in theirs} | {
        ours: row[name] for ours, name in columns.items()
    }


def read_raw(path: str) -> Iterator[tuple[Raw, Origin]]:
    """Yield the rows of one file: a line of JSON as it stands there, anything else as a value.

    Raises:
        DataError: the file cannot be read, or holds no row.
    """
    count = 0
    with open_file(path) as file:
        for raw, origin in _rows_of(file, path):
            count += 1
            yield raw, origin
    if not count:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")


def read_rows(path: str) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Yield the rows of one file as objects. Raises ``DataError``."""
    for raw, origin in read_raw(path):
        yield parse_row(raw, origin), origin


def parse_row(raw: Raw, origin: Origin) -> dict[str, Any]:
    """The row's object. Raises ``DataError`` where it is none."""
    value = _parse_line(raw, origin) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise DataError(
            f"{origin}: the row is {kind(value)}, not an object",
            fix='write every row as a JSON object, such as {"instruction": "...", "output": "..."}',
        )
    return value


def _rows_of(file: IO[bytes], path: str) -> Iterator[tuple[Raw, Origin]]:
    if ending(path) in SEPARATORS:
        return read_csv(file, path, separator=SEPARATORS[ending(path)])
    head, file = read_ahead(file, lambda read: len(read) >= LONGEST_MARK and read.strip(BLANK))
    if head.startswith((PARQUET, ARROW, ARROW_STREAM)):
        return read_columns(file, path, head)
    for bom, name in _WRONG_BOMS.items():
        if head.startswith(bom):
            raise DataError(f"{path} is {name}, not UTF-8", fix=f"convert it: iconv -f {name} -t UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        head = head.removeprefix(codecs.BOM_UTF8)
    return _array(file, path) if head.strip()[:1] == b"[" else _lines(file, path)


def _array(file: IO[bytes], path: str) -> Iterator[tuple[Any, Origin]]:
    text = _decode(file.read(), path)
    try:
        rows = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deep to be read", fix=TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: malformed JSON at line {error.lineno} column {error.colno}: {error.msg}",
            fix="a file that starts with [ must be one JSON array; correct it there, or write one object a line",
        ) from error
    for index, row in enumerate(rows, start=1):
        yield row, Origin(path, index, is_line=False)


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[bytes, Origin]]:
    for number, raw in enumerate(file, start=1):
        if not raw.isspace():
            yield raw, Origin(path, number)


def _parse_line(raw: bytes, origin: Origin) -> Any:
    line = _decode(raw.rstrip(b"\r\n"), str(origin))
    try:
        return json.loads(line)
    except RecursionError as error:
        raise DataError(f"{origin}: JSON nested too deep to be read", fix=TOO_DEEP) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin}: malformed JSON at line {origin.row} column {error.colno}: {error.msg}",
            fix="write one whole JSON object on each line, or a JSON array of objects in the file",
        ) from error


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8",
            fix="save the file as UTF-8, for example: iconv -f CP932 -t UTF-8",
        ) from error
