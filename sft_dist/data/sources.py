"""Read JSON arrays and JSONL files row by row; every fault is named by file and row.

What a file is, is decided by its content: ``[`` opens an array, anything else is read line by line. JSONL is streamed,
so a file larger than memory can be read; an array is held whole, because JSON gives no way to stop inside one.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Iterator
from difflib import get_close_matches
from typing import IO, Any

from sft_dist.config.schema import SourceConfig
from sft_dist.data import formats
from sft_dist.data.fields import kind
from sft_dist.data.messages import Conversation, Origin
from sft_dist.errors import DataError

_WRONG_BOMS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


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
        for row, origin in read_rows(path):
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


def find_files(path: str) -> list[str]:
    """The files that ``path``, a file name or a glob, stands for, sorted. Raises ``DataError`` when there is none."""
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        raise DataError(f"{path} is a folder", fix=f"name its files with a glob: {os.path.join(path, '*.jsonl')}")
    if glob.has_magic(expanded):
        found = sorted(name for name in glob.glob(expanded, recursive=True) if os.path.isfile(name))
        if found:
            return found
        raise DataError(f"no file matches {path}", fix="correct the glob; it is relative to the working directory")
    folder = os.path.dirname(expanded) or "."
    if not os.path.isdir(folder):
        raise DataError(f"{path} does not exist, nor does its folder {folder}", fix="correct the path under data")
    near = get_close_matches(os.path.basename(expanded), os.listdir(folder), n=1)
    hint = f"did you mean {os.path.join(os.path.dirname(path), near[0])}?" if near else "correct the path under data"
    raise DataError(f"{path} does not exist", fix=hint)


def read_rows(path: str) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Yield the rows of one file as objects with their origins. Raises ``DataError`` as ``read_source`` does."""
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be opened: permission denied", fix=f"make it readable: chmod +r {path}")
    count = 0
    with open(path, "rb") as file:
        is_array = _opens_an_array(file, path)
        for value, origin in _array(file, path) if is_array else _lines(file, path):
            if not isinstance(value, dict):
                raise DataError(
                    f"{origin}: the row is {kind(value)}, not an object",
                    fix='write every row as a JSON object, such as {"instruction": "...", "output": "..."}',
                )
            count += 1
            yield value, origin
    if not count:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")


def _opens_an_array(file: IO[bytes], path: str) -> bool:
    """Whether the first character that is not blank is ``[``; leaves ``file`` after a UTF-8 byte order mark."""
    head = file.read(4)
    for bom, name in _WRONG_BOMS.items():
        if head.startswith(bom):
            raise DataError(f"{path} is {name}, not UTF-8", fix=f"convert it: iconv -f {name} -t UTF-8")
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    file.seek(start)
    first = b""
    while block := file.read(4096):
        if first := block.strip()[:1]:
            break
    file.seek(start)
    return first == b"["


def _array(file: IO[bytes], path: str) -> Iterator[tuple[Any, Origin]]:
    text = _decode(file.read(), path)
    try:
        rows = json.loads(text)
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
            yield json.loads(line), Origin(path, number)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: malformed JSON at line {number} column {error.colno}: {error.msg}",
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
