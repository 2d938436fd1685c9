"""Rows of files that are text: a JSON array, an object a line, or one whole document.

A row that cannot be read is given as its ``RowError``, so that the caller decides what becomes of it.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO, Any

from sft_dist.data.files import DOCUMENTS, ending
from sft_dist.data.messages import Origin
from sft_dist.data.strict_json import JsonFault, parse, parse_array
from sft_dist.errors import DataError, RowError

# A line is held in memory whole; no row that is meant is as long.
MAX_ROW_BYTES = 1 << 30


def read_array(file: IO[bytes], path: str) -> Iterator[tuple[Any | RowError, Origin]]:
    """The elements of one JSON array, held in memory whole.

    Raises:
        DataError: the array is not UTF-8, or so damaged that the next element cannot be found.
    """
    try:
        for index, row in enumerate(parse_array(_decode(file.read())), start=1):
            origin = Origin(path, index, is_line=False)
            if isinstance(row, JsonFault):
                row = RowError(f"{origin}: {row.what}", fix=row.fix or "correct the row")
            yield row, origin
    except JsonFault as fault:
        fix = "a file that starts with [ must be one JSON array; correct it there, or write one object a line"
        raise DataError(f"{path}: {fault.what}", fix=fault.fix or fix) from fault


def read_lines(file: IO[bytes], path: str) -> Iterator[tuple[bytes | RowError, Origin]]:
    """Lines as they stand in the file, for ``parse_line``; blank ones are counted and left out."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES):
        number += 1
        origin = Origin(path, number)
        if len(raw) == MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield _too_long(origin), origin
        elif raw.strip():
            yield raw, origin


def parse_line(raw: bytes, origin: Origin) -> Any:
    """The JSON value of a line. Raises ``RowError``."""
    try:
        return parse(_decode(raw.rstrip(b"\r\n")), line=origin.row)
    except JsonFault as fault:
        fix = "write one whole JSON object on each line, or a JSON array of objects in the file"
        if ending(origin.path) in DOCUMENTS:
            fix = f"set format: text if the file is one document; else {fix}"
        raise RowError(f"{origin}: {fault.what}", fix=fault.fix or fix) from fault


def read_document(file: IO[bytes], path: str) -> Iterator[tuple[dict[str, Any] | RowError, Origin]]:
    """The whole file as the row ``{"text": ...}``."""
    origin = Origin(path, 1, is_line=False)
    raw = file.read(MAX_ROW_BYTES)
    if len(raw) == MAX_ROW_BYTES:
        yield _too_long(origin), origin
        return
    try:
        yield {"text": _decode(raw.removeprefix(codecs.BOM_UTF8))}, origin
    except JsonFault as fault:
        yield RowError(f"{origin}: {fault.what}", fix=fault.fix or "save the file as UTF-8"), origin


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JsonFault(
            f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8",
            fix="save the file as UTF-8, for example: iconv -f CP932 -t UTF-8",
        ) from error


def _too_long(origin: Origin) -> RowError:
    return RowError(f"{origin}: the row has {MAX_ROW_BYTES:,} bytes or more", fix="split it into several rows")
