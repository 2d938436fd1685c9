"""Read the rows of files, one by one; every fault is named by file and row.

What a file is, is decided by its content: compression, Parquet and Arrow by their first bytes, ``[`` opens a JSON
array, anything else is read line by line as JSON. CSV and TSV have no mark of their own and go by their names. All are
streamed, so a file larger than memory can be read, but for a JSON array, which gives no way to stop inside it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
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

TOO_DEEP = "write the row with less nesting; no layout has more than a few levels"


def read_source(source: SourceConfig) -> Iterator[Conversation]:
    """Yield the conversations of ``source``, files in sorted order, rows in file order.

    Under ``auto`` the first row decides the layout and every later row, of every file of a glob, must have it: a mixed
    source is more often a mistake than a wish, and rows read by the wrong rules would be trained on in silence.

    Raises:
        DataError: a file is missing, empty or not JSON, or a row cannot be trained on.
    """
    layout = None if source.format == "auto" else source.format
    first: Origin | None = None
    for path in find_files(source.path):
        for stored, origin in read_rows(path):
            row = _renamed(stored, source.columns, origin)
            if source.format == "auto":
                found = formats.recognise(row, origin)
                if first is None or layout is None:
                    first, layout = origin, found
                elif found != layout:
                    raise DataError(
                        f"{origin}: the row has the {found} layout, but the first row ({first}) has {layout}",
                        fix=f"list {found} and {layout} rows as two sources of data.train, one file each",
                    )
            assert layout is not None
            yield formats.parse(row, origin, layout)


def _renamed(row: dict[str, Any], columns: dict[str, str], origin: Origin) -> dict[str, Any]:
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


def read_rows(path: str) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Yield the rows of one file as objects with their origins. Raises ``DataError`` as ``read_source`` does."""
    count = 0
    with open_file(path) as file:
        for value, origin in _rows_of(file, path):
            if not isinstance(value, dict):
                raise DataError(
                    f"{origin}: the row is {kind(value)}, not an object",
                    fix='write every row as a JSON object, such as {"instruction": "...", "output": "..."}',
                )
            count += 1
            yield value, origin
    if not count:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")


def _rows_of(file: IO[bytes], path: str) -> Iterator[tuple[Any, Origin]]:
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


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[Any, Origin]]:
    for number, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        line = _decode(raw.rstrip(b"\r\n"), f"{path}:{number}")
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise DataError(f"{path}:{number}: JSON nested too deep to be read", fix=TOO_DEEP) from error
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: malformed JSON at line {number} column {error.colno}: {error.msg}",
                fix="write one whole JSON object on each line, or a JSON array of objects in the file",
            ) from error
        yield row, Origin(path, number)


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8",
            fix="save the file as UTF-8, for example: iconv -f CP932 -t UTF-8",
        ) from error
