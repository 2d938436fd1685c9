"""Some rows of a source, spread over its files, and how many there are: what an estimate is made from.

Lines of JSON are found by their line breaks and Parquet files know their rows, so any of them can be drawn. Other
kinds (compressed, CSV, Arrow) are read from their beginning for some MiB, and their rows counted by how much of the
file that was; a JSON array is read whole, as training reads it.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data.chunk import Rows
from sft_dist.data.files import DOCUMENTS, decompressed, ending, open_raw
from sft_dist.data.messages import Origin
from sft_dist.data.sources import BLANK, SEPARATORS, Raw, RowParser, rows_of
from sft_dist.data.tables import ARROW, ARROW_STREAM, PARQUET, ParquetRows
from sft_dist.errors import DataError

# What is looked at, of one source: files, bytes of lines, bytes on disk of what can only be read from its beginning,
# bytes of Parquet's row groups, and bytes of the rows that are drawn.
MAX_FILES = 128
MAX_LINE_BYTES = 4 << 30
MAX_STREAMED_BYTES = 48 << 20
MAX_GROUP_BYTES = 256 << 20
MAX_SAMPLE_BYTES = 12 << 20

BLOCK_BYTES = 32 << 20
MIN_ROWS = 32

# Relative standard error of a number of rows that is told by the beginning of a file: an assumption.
BEGINNING_ERROR = 0.05

# What a file begins with that is neither lines nor a JSON array.
OTHER = (PARQUET, ARROW, ARROW_STREAM, b"\x1f\x8b", b"\x28\xb5\x2f\xfd")

NumberedRows = list[tuple[int, Raw]]


@dataclass(frozen=True)
class Sample:
    """Rows of one source.

    Args:
        chunks: the drawn rows of each file, in the order of the source.
        num_rows: of the whole source.
        count_error: relative standard error of that; 0.0 where they were counted.
        is_whole: every row was drawn.
        from_beginning: files of which no more than the beginning was read.
    """

    chunks: list[Rows]
    num_rows: float
    count_error: float
    is_whole: bool
    from_beginning: int

    @property
    def num_drawn(self) -> int:
        return sum(len(chunk.rows) for chunk in self.chunks)


@dataclass(frozen=True)
class _File:
    """A file's rows.

    Args:
        draw: given a number and a generator, so many of them with their places, ascending.
    """

    path: str
    by_line: bool
    num_rows: float
    error: float
    draw: Callable[[int, np.random.Generator], NumberedRows]
    from_beginning: bool = False


def draw_rows(source: SourceConfig, files: Sequence[str], parser: RowParser, *, most: int, seed: int) -> Sample:
    """Draws at most ``most`` rows, each as likely as any other, the same for the same seed.

    Args:
        files: of the source, on this machine.

    Raises:
        DataError: a file cannot be read, or holds no row.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    seen = _spread(len(files), MAX_FILES)
    share = MAX_LINE_BYTES // len(seen), max(1 << 20, MAX_STREAMED_BYTES // len(seen))
    surveyed = [_survey(files[n], parser.documents, *share, most=most, rng=rng) for n in seen]
    rows = np.array([file.num_rows for file in surveyed])
    seen_bytes, all_bytes = (sum(map(os.path.getsize, names)) for names in ([files[n] for n in seen], files))
    # Of files that were not looked at: documents are a row each, others have as many rows a byte.
    factor = len(files) / len(seen) if parser.documents else all_bytes / max(1, seen_bytes)
    num_rows = float(rows.sum()) * factor
    error = float(np.sqrt(sum((file.num_rows * file.error) ** 2 for file in surveyed))) / float(rows.sum())
    if len(seen) < len(files) and not parser.documents:
        error = float(np.hypot(error, BEGINNING_ERROR))
    most = min(most, max(MIN_ROWS, int(MAX_SAMPLE_BYTES / (all_bytes / num_rows))))
    is_whole = error == 0 and len(seen) == len(files) and num_rows <= most
    numbers = [round(n) for n in rows] if is_whole else _allotted(rows, most)
    chunks: list[Rows] = []
    for number, index, file in zip(numbers, seen, surveyed, strict=True):
        drawn = file.draw(number, rng)
        if drawn:
            places, raw = zip(*drawn, strict=True)
            chunks.append(Rows(len(chunks), index, file.path, file.by_line, list(places), list(raw)))
    if is_whole:
        num_rows = float(sum(len(chunk.rows) for chunk in chunks))
    return Sample(chunks, num_rows, error, is_whole, sum(file.from_beginning for file in surveyed))


def _spread(number: int, most: int) -> list[int]:
    """At most ``most`` of the first ``number`` integers, evenly spread."""
    return sorted({int(n) for n in np.linspace(0, number - 1, min(number, most))})


def _allotted(rows: NDArray[np.float64], most: int) -> list[int]:
    """How many to draw of each file, so that every row of all is as likely."""
    exact = np.minimum(rows, most * rows / rows.sum())
    allotted = np.floor(exact).astype(np.int64)
    for n in np.argsort(allotted - exact, kind="stable")[: round(exact.sum()) - int(allotted.sum())]:
        allotted[n] += 1
    return [int(n) for n in allotted]


def _survey(
    path: str, documents: bool, line_bytes: int, streamed_bytes: int, *, most: int, rng: np.random.Generator
) -> _File:
    with open_raw(path) as file:
        head = file.read(4096)
    if head.startswith(PARQUET):
        return _parquet(path)
    is_named = ending(path) in SEPARATORS or (documents and ending(path) in DOCUMENTS)
    is_text = not is_named and not head.startswith(OTHER)
    # UTF-16 has zero bytes, and is refused by what reads it from the beginning.
    if is_text and b"\0" not in head and head.removeprefix(codecs.BOM_UTF8).strip(BLANK)[:1] not in (b"[", b""):
        return _lines(path, line_bytes)
    return _streamed(path, documents, streamed_bytes, most, rng)


def _lines(path: str, most_bytes: int) -> _File:
    size = os.path.getsize(path)
    num_blocks = -(-size // BLOCK_BYTES)
    blocks = _spread(num_blocks, max(1, most_bytes // BLOCK_BYTES))
    starts, numbers, per_block, lines = [], [], [], 0
    with open(path, "rb") as file:
        for block in blocks:
            begin = block * BLOCK_BYTES
            # A line belongs to the block in which it begins: behind a line break at most one byte before it.
            file.seek(max(0, begin - 1))
            content = np.frombuffer(file.read(min(BLOCK_BYTES, size - begin) - (begin == 0)), np.uint8)
            found = np.flatnonzero(content == ord("\n")).astype(np.int64) + max(0, begin - 1) + 1
            if begin == 0:
                first = len(codecs.BOM_UTF8) if content[:3].tobytes() == codecs.BOM_UTF8 else 0
                found = np.concatenate([np.array([first], np.int64), found])
            starts.append(found)
            numbers.append(np.arange(lines + 1, lines + 1 + len(found)))
            per_block.append(len(found) / max(1, len(content)))
            lines += len(found)
    start, number = np.concatenate(starts), np.concatenate(numbers)
    # Nothing but a line break, or with a carriage return, is blank.
    is_row = np.diff(start, append=size + 3) > 2
    is_row &= start < size
    start, number = start[is_row], number[is_row]
    if not len(start):
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")
    is_counted = len(blocks) == num_blocks
    covered = 1.0 if is_counted else len(blocks) / num_blocks
    error = 0.0 if is_counted else float(np.std(per_block) / np.mean(per_block) / np.sqrt(len(blocks)))

    def draw(count: int, rng: np.random.Generator) -> NumberedRows:
        chosen = np.sort(rng.permutation(len(start))[:count])
        rows: NumberedRows = []
        with open(path, "rb") as file:
            for n in chosen:
                file.seek(int(start[n]))
                if (line := file.readline()).strip():
                    rows.append((int(number[n] / covered), line))
        return rows

    return _File(path, True, len(start) / covered, error, draw)


def _parquet(path: str) -> _File:
    parquet = ParquetRows.of(path)
    total = sum(parquet.group_rows)
    if not total:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")
    before = np.cumsum([0, *parquet.group_rows])

    def draw(count: int, rng: np.random.Generator) -> NumberedRows:
        mean_bytes = sum(parquet.group_bytes) / len(parquet.group_bytes)
        groups = _spread(len(parquet.group_rows), max(1, int(MAX_GROUP_BYTES / max(1.0, mean_bytes))))
        if count >= total:
            groups = list(range(len(parquet.group_rows)))
        allotted = _allotted(np.array([float(parquet.group_rows[g]) for g in groups]), count)
        rows: NumberedRows = []
        for group, number in zip(groups, allotted, strict=True):
            if number:
                chosen = np.sort(rng.permutation(parquet.group_rows[group])[:number])
                values = parquet.read(group, chosen.tolist())
                rows += [(int(before[group] + n) + 1, value) for n, value in zip(chosen, values, strict=True)]
        return rows

    return _File(path, False, float(total), 0.0, draw)


def _streamed(path: str, documents: bool, most_bytes: int, most: int, rng: np.random.Generator) -> _File:
    size, count, seen, by_line = os.path.getsize(path), 0, 0, False
    kept: list[tuple[Raw, Origin]] = []
    is_read = True
    with open_raw(path) as raw, decompressed(raw, path) as file:
        for row in rows_of(file, path, documents):
            count, seen, by_line = count + 1, raw.tell(), row[1].is_line
            # Each row that was read is as likely to be kept (Vitter 1985, algorithm R).
            if len(kept) < most:
                kept.append(row)
            elif (place := int(rng.integers(count))) < most:
                kept[place] = row
            # A JSON array is read to its end before its first row: nothing is saved by stopping there.
            if most_bytes < seen < size:
                is_read = False
                break
    if not count:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")

    def draw(number: int, rng: np.random.Generator) -> NumberedRows:
        chosen = rng.permutation(len(kept))[:number]
        return sorted(((kept[n][1].row, kept[n][0]) for n in chosen), key=lambda row: row[0])

    num_rows = float(count) if is_read else count * size / seen
    return _File(path, by_line, num_rows, 0.0 if is_read else BEGINNING_ERROR, draw, from_beginning=not is_read)
