"""Read the rows of files, one by one; every fault is named by file and row.

What a file is, is decided by its content: compression, Parquet and Arrow by their first bytes, ``[`` opens a JSON
array, anything else is read line by line as JSON. CSV and TSV have no mark of their own and go by their names, and so
do plain texts, which must be asked for (``format: text``). All are streamed, so a file larger than memory can be read,
but for a JSON array, which gives no way to stop inside it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from sft_dist.config.data_schema import SourceConfig
from sft_dist.data import formats
from sft_dist.data.fields import Fields, kind, listed
from sft_dist.data.files import DOCUMENTS, ending, find_files, is_url, open_file, read_ahead
from sft_dist.data.hub_dataset import check_in_cache, dataset_files, files_in_cache, is_dataset_id
from sft_dist.data.messages import Origin, Row
from sft_dist.data.rejected import none_left
from sft_dist.data.tables import ARROW, ARROW_STREAM, PARQUET, read_columns, read_csv
from sft_dist.data.text_rows import parse_line, read_array, read_document, read_lines
from sft_dist.errors import ConfigError, DataError, RowError

SEPARATORS = {".csv": ",", ".tsv": "\t"}

LONGEST_MARK = max(map(len, (PARQUET, ARROW, ARROW_STREAM)))
BLANK = b" \t\r\n" + codecs.BOM_UTF8

_HUB_KEYS = ("split", "subset", "revision")


Raw = Any
"""A row before it is parsed: bytes are a line of JSON, a ``RowError`` says why it cannot be read, else its value."""


def check_source(source: SourceConfig) -> None:
    """Looks whether a source is there; asks no network about a dataset of the hub.

    Raises:
        ConfigError: ``split``, ``subset`` or ``revision`` of something that is no dataset of the hub.
        DataError: there is no such file, or the dataset is not in the local hub cache and cannot be fetched.
    """
    if _is_of_the_hub(source):
        check_in_cache(source)
    else:
        find_files(source.path, documents=source.format == "text")


def source_files(source: SourceConfig) -> list[str]:
    """The files of a source, in the order in which they are read; those of a dataset of the hub are fetched first.

    Raises:
        ConfigError, DataError: as ``check_source``; or the hub does not give the dataset.
    """
    if _is_of_the_hub(source):
        return dataset_files(source)
    return find_files(source.path, documents=source.format == "text")


def files_here(source: SourceConfig) -> list[str] | None:
    """The files of a source that lie on this machine; None where one is missing or behind a URL. Asks no network."""
    if _is_of_the_hub(source):
        return files_in_cache(source)
    if is_url(source.path):
        return None
    try:
        return find_files(source.path, documents=source.format == "text")
    except DataError:
        return None


def _is_of_the_hub(source: SourceConfig) -> bool:
    if is_dataset_id(source.path):
        return True
    given = [key for key in _HUB_KEYS if getattr(source, key) is not None]
    if given:
        raise ConfigError(
            f"data: {given[0]} of {source.path} has no effect: it is no dataset of the hub (OWNER/NAME), or a file or "
            "folder of that name is here",
            fix=f"remove {given[0]}, or correct path",
        )
    return False


def read_source(source: SourceConfig, *, on_rejected: Callable[[RowError], None] | None = None) -> Iterator[Row]:
    """Yield the rows of ``source``, files in sorted order, rows in file order.

    Args:
        on_rejected: gets the error of each row that cannot be read, which is left out; None: it is raised.

    Raises:
        DataError: a file is missing, empty or damaged, or none of the rows can be read.
        ConfigError: as ``check_source``.
    """
    files = source_files(source)
    parser = parser_of(source, files, skips_bad_rows=on_rejected is not None)
    errors: list[RowError] = []
    num_read = num_rejected = 0
    for path in files:
        for raw, origin in read_raw(path, documents=parser.documents):
            try:
                row = parser.parse(raw, origin)
            except RowError as error:
                if on_rejected is None:
                    raise
                num_rejected += 1
                errors = errors or [error]
                on_rejected(error)
            else:
                num_read += 1
                yield row
    if errors and not num_read:
        raise none_left(files, num_rejected, errors[0].what, fix=errors[0].fix) from errors[0]


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

    @property
    def documents(self) -> bool:
        """Whether a file with the name of a plain text is one row: only if the configuration says so."""
        return self.layout == "text" and self.recognised is None

    def parse(self, raw: Raw, origin: Origin) -> Row:
        """Reads a row as ``read_raw`` gives it. Raises ``RowError``."""
        row = _renamed(parse_row(raw, origin), self.columns, origin)
        if self.recognised is not None:
            found = formats.recognise(row, origin)
            if found != self.layout:
                first = f"the first row ({self.recognised}) has {self.layout}"
                raise RowError(
                    f"{origin}: the row has the {found} layout, but {first}",
                    fix=f"list {found} and {self.layout} rows as two sources of data.train, one file each",
                )
        return formats.parse(row, origin, self.layout)


def parser_of(source: SourceConfig, files: Sequence[str], *, skips_bad_rows: bool = False) -> RowParser:
    """The parser of a source's rows.

    Under ``auto`` the first row decides the layout and every later row, of every file of a glob, must have it: a mixed
    source is more often a mistake than a wish, and rows read by the wrong rules would be trained on in silence.

    Args:
        skips_bad_rows: the first row that has a layout decides.

    Raises:
        DataError: a file is damaged, or no row has a layout.
    """
    if source.format != "auto":
        return RowParser(source.format, None, source.columns)
    first: RowError | None = None
    num_rejected = 0
    for raw, origin in chain.from_iterable(map(read_raw, files)):
        try:
            row = _renamed(parse_row(raw, origin), source.columns, origin)
            return RowParser(formats.recognise(row, origin), origin, source.columns)
        except RowError as error:
            if not skips_bad_rows:
                raise
            first = first or error
            num_rejected += 1
    assert first is not None, "read_raw refuses a file without rows"
    raise none_left(files, num_rejected, first.what, fix=first.fix) from first


def _renamed(row: dict[str, Any], columns: Mapping[str, str], origin: Origin) -> dict[str, Any]:
    """The row with the keys that a layout knows, where ``columns`` says what the file calls them."""
    missing = [name for name in columns.values() if name not in row]
    if missing:
        raise Fields(row, origin).error(
            f"the row has no {', '.join(missing)}, which columns names (keys: {listed(row)})",
            fix="correct columns of the source, or remove it",
        )
    theirs = set(columns.values()) | columns.keys()
    return {key: value for key, value in row.items() if key not in theirs} | {
        ours: row[name] for ours, name in columns.items()
    }


def read_raw(path: str, *, documents: bool = False) -> Iterator[tuple[Raw, Origin]]:
    """Yield the rows of one file: a line of JSON as it stands there, anything else as a value.

    Args:
        documents: a file with the name of a plain text is one row ``{"text": ...}``.

    Raises:
        DataError: the file cannot be read, or holds no row.
    """
    count = 0
    with open_file(path) as file:
        for raw, origin in rows_of(file, path, documents):
            count += 1
            yield raw, origin
    if not count:
        raise DataError(f"{path} holds no row", fix="put rows into the file, or remove it from the sources")


def read_rows(path: str) -> Iterator[tuple[dict[str, Any], Origin]]:
    """Yield the rows of one file as objects. Raises ``DataError``."""
    for raw, origin in read_raw(path):
        yield parse_row(raw, origin), origin


def parse_row(raw: Raw, origin: Origin) -> dict[str, Any]:
    """The row's object. Raises ``RowError`` where it is none."""
    if isinstance(raw, RowError):
        raise raw
    value = parse_line(raw, origin) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise RowError(
            f"{origin}: the row is {kind(value)}, not an object",
            fix='write every row as a JSON object, such as {"instruction": "...", "output": "..."}',
        )
    return value


def rows_of(file: IO[bytes], path: str, documents: bool) -> Iterator[tuple[Raw, Origin]]:
    """The rows of an open file without compression, as ``read_raw`` gives them."""
    if ending(path) in SEPARATORS:
        return read_csv(file, path, separator=SEPARATORS[ending(path)])
    if documents and ending(path) in DOCUMENTS:
        return read_document(file, path)
    head, file = read_ahead(file, LONGEST_MARK, blank=BLANK)
    if head.startswith((PARQUET, ARROW, ARROW_STREAM)):
        return read_columns(file, path, head)
    encoding = json.detect_encoding(head[:4])
    if not encoding.startswith("utf-8"):
        name = encoding.upper()
        raise DataError(f"{path} is {name}, not UTF-8", fix=f"convert it: iconv -f {name} -t UTF-8")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        head = head.removeprefix(codecs.BOM_UTF8)
    return read_array(file, path) if head.strip()[:1] == b"[" else read_lines(file, path)
