"""Finds the files of a source, on this machine or behind a URL, and opens them without their compression."""

from __future__ import annotations

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import IO, Any

from sft_dist.data.fields import said
from sft_dist.errors import DataError

# What a folder is searched for, compressed or not; a file that is named or matched by a glob may be called anything.
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
# Plain text, under the format text only: a README beside the data is none.
DOCUMENTS = (".txt", ".md")
COMPRESSED = (".gz", ".zst")

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

# fsspec's packages for the kinds of storage that it has no code of its own for.
PACKAGES = {
    "http": "fsspec[http]",
    "https": "fsspec[http]",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}


def is_url(path: str) -> bool:
    return "://" in path


def find_files(path: str, *, documents: bool = False) -> list[str]:
    """The files that ``path`` stands for, sorted: a file, all data files below a folder, a glob, or a URL of these.

    Args:
        documents: plain text below a folder is data too.

    Raises:
        DataError: there is none.
    """
    endings = ENDINGS + DOCUMENTS if documents else ENDINGS
    if is_url(path):
        return _find_urls(path, endings)
    expanded = os.path.expanduser(path)
    if os.path.isfile(expanded):
        return [expanded]
    if os.path.isdir(expanded):
        found = sorted(_below(expanded, endings))
        if found:
            return found
        raise DataError(
            f"{path} is a folder without data files", fix=f"name its files by a glob; they end in {', '.join(endings)}"
        )
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


def ending(path: str) -> str:
    """``.csv`` of ``rows.CSV.gz`` and of ``https://host/rows.csv?version=2``."""
    name = path.partition("?")[0].lower() if is_url(path) else path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return os.path.splitext(name)[1]


@contextmanager
def open_file(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed if it begins as gzip or Zstandard does, whatever it is called.

    Raises:
        DataError: it cannot be opened or read to its end.
    """
    with open_raw(path) as raw, decompressed(raw, path) as file:
        yield file


@contextmanager
def decompressed(raw: IO[bytes], path: str) -> Iterator[IO[bytes]]:
    """The same of a file that is open; ``raw.tell()`` says how much of it has been read. Raises ``DataError``."""
    head, file = read_ahead(raw, len(ZSTD))
    if head.startswith(GZIP):
        file = gzip.GzipFile(fileobj=file)  # type: ignore[assignment]
    elif head.startswith(ZSTD):
        import pyarrow

        file = io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    try:
        yield file
    except (EOFError, OSError, zlib.error) as e:
        raise DataError(
            f"{path} cannot be read to its end ({said(e)})",
            fix="fetch or compress the file again; it may be cut off",
        ) from e


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes were read before."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def read_ahead(file: IO[bytes], count: int, *, blank: bytes = b"") -> tuple[bytes, IO[bytes]]:
    """The beginning of a stream, at least ``count`` bytes and one that is not in ``blank`` unless it ends before, and
    the stream from its beginning."""
    blocks: list[bytes] = []
    length, has_content = 0, not blank
    while length < count or not has_content:
        block = file.read(4096)
        if not block:
            break
        blocks.append(block)
        length += len(block)
        has_content = has_content or bool(block.strip(blank))
    head = b"".join(blocks)
    if file.seekable():
        file.seek(0)
        return head, file
    return head, io.BufferedReader(_Rejoined(head, file))


def _below(folder: str, endings: Sequence[str]) -> Iterator[str]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (os.path.join(where, name) for name in names if _is_data(name, endings))


def _is_data(name: str, endings: Sequence[str]) -> bool:
    return not name.startswith((".", "_")) and ending(name) in endings


def open_raw(path: str) -> IO[bytes]:
    """A file's bytes as they are. Raises ``DataError``."""
    return _open_url(path) if is_url(path) else _open_local(path)


def file_state(path: str) -> str | None:
    """What changes when the file does: its size and the time or tag of its last change; None where it has none."""
    if not is_url(path):
        status = os.stat(path)
        return f"{status.st_size} {status.st_mtime_ns}"
    system, inner = _file_system(path)
    try:
        info = system.info(inner)
    except Exception as e:
        raise _unreachable(path, e) from e
    changed = [str(info[key]) for key in ("ETag", "etag", "LastModified", "mtime", "md5Hash") if info.get(key)]
    return f"{info.get('size')} {' '.join(changed)}" if changed else None


def _open_local(path: str) -> IO[bytes]:
    try:
        return open(path, "rb")
    except PermissionError as e:
        raise DataError(f"{path} cannot be opened: permission denied", fix=f"make it readable: chmod +r {path}") from e


def _open_url(path: str) -> IO[bytes]:
    system, inner = _file_system(path)
    try:
        opened = system.open(inner, "rb")
    except Exception as e:
        raise _unreachable(path, e) from e
    return io.BufferedReader(opened)  # fsspec's own files read a line of any length


def _find_urls(path: str, endings: Sequence[str]) -> list[str]:
    system, inner = _file_system(path)
    try:
        # A query may hold the signs of a glob; only what lies in a store can be listed.
        if glob.has_magic(path) and not path.startswith(("http://", "https://")):
            found = sorted(system.unstrip_protocol(name) for name in system.glob(inner) if system.isfile(name))
        elif not path.startswith(("http://", "https://")) and system.isdir(inner):
            names = (name for name in system.find(inner) if _is_data(os.path.basename(name), endings))
            found = sorted(system.unstrip_protocol(name) for name in names)
        else:
            found = [path] if system.exists(inner) else []
    except Exception as e:
        raise _unreachable(path, e) from e
    if not found:
        raise DataError(f"there is no file at {path}", fix="correct the URL under data")
    return found


def _file_system(path: str) -> tuple[Any, str]:
    import fsspec

    scheme = path.partition("://")[0]
    try:
        system, inner = fsspec.core.url_to_fs(path)
    except ImportError as e:
        package = PACKAGES.get(scheme, f"for {scheme}")
        raise DataError(f"{path}: {scheme}:// needs a package", fix=f"pip install {package}") from e
    except ValueError as e:
        raise DataError(
            f"{path}: {scheme}:// is no storage that is known", fix="use a path, or https://, s3:// or gs://"
        ) from e
    return system, inner


def _unreachable(path: str, error: Exception) -> DataError:
    return DataError(
        f"{path} cannot be read ({type(error).__name__}: {said(error)})",
        fix="check the URL, the network and your credentials",
    )
