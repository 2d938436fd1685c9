"""Rows of files that have columns: CSV and TSV, Parquet, Arrow."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from sft_dist.data.fields import listed, said
from sft_dist.data.messages import Origin
from sft_dist.errors import DataError, RowError

PARQUET, ARROW = b"PAR1", b"ARROW1"
# How Arrow's stream format begins: a continuation marker. ``datasets`` writes such files.
ARROW_STREAM = b"\xff\xff\xff\xff"

# Rows that are turned into Python's objects at a time.
BATCH_ROWS = 1024

# A cell may hold a long conversation; Python's own limit is 128 KiB.
MAX_CELL_CHARACTERS = 1 << 30


def read_csv(file: IO[bytes], path: str, *, separator: str) -> Iterator[tuple[dict[str, Any] | RowError, Origin]]:
    """Rows of text by the names in the first line; an empty cell is "".

    A row with more or fewer cells than the first line is given as its ``RowError``.

    Raises:
        DataError: the quotes are damaged, or the text is not UTF-8.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.reader(text, delimiter=separator, strict=True)
    names: list[str] | None = None
    number = 0
    try:
        for cells in rows:
            if names is None:
                names = _names(cells, path)
                continue
            if not cells:
                continue
            number += 1
            if len(cells) != len(names):
                wrong = RowError(
                    f"{path} row {number} (line {rows.line_num}) has {len(cells)} cells, and the first line names "
                    f"{len(names)}",
                    fix="put text that holds separators or line breaks between double quotes",
                )
                yield wrong, Origin(path, number, is_line=False)
            else:
                yield dict(zip(names, cells, strict=True)), Origin(path, number, is_line=False)
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}: after row {number}, byte 0x{e.object[e.start]:02x} is not UTF-8",
            fix="save the file as UTF-8, for example: iconv -f CP932 -t UTF-8",
        ) from e
    except csv.Error as e:
        raise DataError(f"{path}: after row {number}: {said(e)}", fix="correct the quotes there") from e


def _names(cells: list[str], path: str) -> list[str]:
    names = [name.strip() for name in cells]
    if "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: the first line names columns {listed(map(repr, names))}",
            fix="give every column a name of its own in the first line",
        )
    return names


def read_columns(file: IO[bytes], path: str, head: bytes) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Rows of a Parquet or Arrow file, a batch at a time.

    A key that a row lacks is stored there as null in its struct, and would become an argument of null in a tool call:
    keys with null are left out, at any depth.

    Args:
        head: first bytes of the file, which say what it is.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow

    number = 0
    try:
        for rows in map(_to_rows, _batches(file, head)):
            for row in rows:
                number += 1
                yield _without_null(row), Origin(path, number, is_line=False)
    except (pyarrow.ArrowException, ValueError, OverflowError) as e:
        raise DataError(f"{path}: damaged after row {number} ({said(e)})", fix="fetch or write the file again") from e


@dataclass(frozen=True)
class ParquetRows:
    """Any rows of a Parquet file, without reading those that are not asked for.

    Args:
        group_rows: [row groups] rows of each.
        group_bytes: [row groups] bytes of each, without compression.
    """

    path: str
    group_rows: list[int]
    group_bytes: list[int]

    @classmethod
    def of(cls, path: str) -> ParquetRows:
        """Raises ``DataError``: the file is damaged."""
        import pyarrow.parquet

        try:
            about = pyarrow.parquet.read_metadata(path)
            groups = [about.row_group(number) for number in range(about.num_row_groups)]
        except (pyarrow.ArrowException, OSError) as e:
            raise DataError(f"{path}: damaged ({said(e)})", fix="fetch or write the file again") from e
        return cls(path, [group.num_rows for group in groups], [group.total_byte_size for group in groups])

    def read(self, group: int, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of a row group with these numbers, as ``read_columns`` gives them. Raises ``DataError``."""
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(self.path).read_row_group(group).take(pyarrow.array(rows, "int64"))
            return [_without_null(row) for batch in table.to_batches() for row in _to_rows(batch)]
        except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as e:
            raise DataError(f"{self.path}: damaged ({said(e)})", fix="fetch or write the file again") from e


def _to_rows(batch: Any) -> list[dict[str, Any]]:
    """Raises ``ValueError`` for what would end the process, lose a column or make no text if it were converted."""
    # Offsets are not checked where they are used, nor is text where it is read.
    batch.validate(full=True)
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _batches(file: IO[bytes], head: bytes) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if head.startswith(ARROW_STREAM):
        yield from (part.slice(start, BATCH_ROWS) for part in pyarrow.ipc.open_stream(file) for start in _starts(part))
        return
    # Both formats have their index at the end.
    seekable = file if file.seekable() else io.BytesIO(file.read())
    if head.startswith(PARQUET):
        yield from pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=BATCH_ROWS)
        return
    reader = pyarrow.ipc.open_file(seekable)
    for part in map(reader.get_batch, range(reader.num_record_batches)):
        yield from (part.slice(start, BATCH_ROWS) for start in _starts(part))


def _starts(batch: Any) -> range:
    return range(0, batch.num_rows, BATCH_ROWS)


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items() if inner is not None}
    return [_without_null(inner) for inner in value] if isinstance(value, list) else value
