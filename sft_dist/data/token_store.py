"""The rows of one source as tokens, on disk: written once, chunk by chunk, and mapped into memory by all who read.

A folder with

- ``input_ids.bin`` (int32) and ``supervised.bin`` (uint8): all rows, one after the other;
- ``rows.bin`` (``ROW``): a record a row;
- ``chunks.jsonl``: a line for every chunk of the source, where it ends in the files and what was counted in it;
- ``meta.json``: written last; a folder that has it is complete.

The files depend on the source and on how it is tokenised, and on nothing else: not on the number of processes, nor on
how often the work was interrupted.
"""

from __future__ import annotations

import heapq
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft_dist.data.messages import Origin

ROW = np.dtype(
    [
        ("length", "<i4"),  # tokens
        ("supervised", "<i4"),  # tokens that are trained; the first of a row is never predicted and never counts
        ("file", "<i4"),  # index among the source's files
        ("number", "<i8"),  # line of the file, or row
        ("last", "<i4"),  # id of the last token that is trained
        ("prompt", "<u8"),  # XXH3-64 of what comes before the first trained answer
        ("content", "<u8"),  # XXH3-64 of tokens and mask
    ]
)
RowRecords = np.ndarray[Any, np.dtype[np.void]]

IDS, MASK, ROWS, CHUNKS, META = "input_ids.bin", "supervised.bin", "rows.bin", "chunks.jsonl", "meta.json"

# Of work that an interruption may cost.
SECONDS_BETWEEN_SYNCS = 2.0

# Bytes.
READ_AT_ONCE = 1 << 26

# Messages of rejected rows that are kept.
MAX_REJECTIONS = 20


@dataclass
class TokenizedChunk:
    """Consecutive rows of a file, tokenised.

    Args:
        file: index of the file.
        by_line: whether its rows are known by line.
        counts: what happened to rows of the chunk, by name (``rejected_rows``, ``rewritten_rows``, ...).
        rejected: messages of rows that were rejected, at most ``MAX_REJECTIONS``.
    """

    file: int
    by_line: bool
    input_ids: bytes = b""
    supervised: bytes = b""
    rows: bytes = b""
    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[str] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.rows) // ROW.itemsize

    @property
    def num_tokens(self) -> int:
        return len(self.supervised)


@dataclass(frozen=True)
class TokenStore:
    """What ``StoreWriter`` wrote, mapped.

    Args:
        input_ids: [tokens] int32.
        supervised: [tokens] uint8, 1 where the token is trained.
        rows: [rows] of ``ROW``.
        meta: see ``complete``.
    """

    folder: Path
    input_ids: NDArray[np.int32]
    supervised: NDArray[np.uint8]
    rows: RowRecords
    meta: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Maps a complete store. Raises ``FileNotFoundError``."""
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            input_ids=_map(folder / IDS, np.dtype("<i4")),
            supervised=_map(folder / MASK, np.dtype("u1")),
            rows=_map(folder / ROWS, ROW),
            meta=meta,
        )

    @property
    def starts(self) -> NDArray[np.int64]:
        """[rows] where each row begins."""
        lengths = self.rows["length"].astype(np.int64)
        return np.asarray(np.cumsum(lengths) - lengths)

    def origin(self, row: int) -> str:
        """File and row that a row comes from."""
        record = self.rows[row]
        file = int(record["file"])
        return str(Origin(self.meta["files"][file], int(record["number"]), self.meta["by_line"][file]))


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    # An empty file cannot be mapped.
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r")


def is_complete(folder: Path) -> bool:
    return (folder / META).is_file()


class StoreWriter:
    """Writes the chunks of a store in order, and goes on where an earlier process was stopped.

    A chunk counts as written when its line stands in ``chunks.jsonl``, and that is written after everything else of it
    has reached the disk. What stands behind the last such chunk is cut off.

    Args:
        folder: of the store, not complete yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.done = read_chunks(folder)
        tokens, rows = (sum(entry[name] for entry in self.done) for name in ("tokens", "rows"))
        lines = sum(len(_line(entry)) for entry in self.done)
        sizes = {IDS: 4 * tokens, MASK: tokens, ROWS: rows * ROW.itemsize, CHUNKS: lines}
        self._files = {name: _cut(folder / name, size) for name, size in sizes.items()}
        self._unsaid: list[bytes] = []
        self._synced = time.monotonic()

    def append(self, number: int, chunk: TokenizedChunk) -> None:
        """Writes chunk ``number`` of the source behind those before."""
        for name, content in ((IDS, chunk.input_ids), (MASK, chunk.supervised), (ROWS, chunk.rows)):
            self._files[name].write(content)
        entry = {
            "chunk": number,
            "tokens": chunk.num_tokens,
            "rows": chunk.num_rows,
            "file": chunk.file,
            "by_line": chunk.by_line,
            "counts": {name: count for name, count in chunk.counts.items() if count},
            "rejected": chunk.rejected,
        }
        self.done.append(entry)
        self._unsaid.append(_line(entry))
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self.sync()

    def sync(self) -> None:
        for name in (IDS, MASK, ROWS):
            self._files[name].flush()
            os.fsync(self._files[name].fileno())
        self._files[CHUNKS].write(b"".join(self._unsaid))
        self._files[CHUNKS].flush()
        self._unsaid.clear()
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        os.fsync(self._files[CHUNKS].fileno())
        for file in self._files.values():
            file.close()


def read_chunks(folder: Path) -> list[dict[str, Any]]:
    """The chunks that a store has whole."""
    path = folder / CHUNKS
    if not path.exists():
        return []
    # The last line may have been cut off.
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def merge(parts: Sequence[Path], folder: Path) -> None:
    """Writes the chunks of stores that have every n-th chunk of a source each into one, in the source's order."""
    shutil.rmtree(folder, ignore_errors=True)
    with closing(StoreWriter(folder)) as writer:
        chunks = [_read_back(part) for part in parts]
        for number, chunk in heapq.merge(*chunks, key=lambda numbered: numbered[0]):
            writer.append(number, chunk)


def _read_back(folder: Path) -> Iterator[tuple[int, TokenizedChunk]]:
    with (folder / IDS).open("rb") as ids, (folder / MASK).open("rb") as mask, (folder / ROWS).open("rb") as rows:
        for entry in read_chunks(folder):
            chunk = TokenizedChunk(
                file=entry["file"],
                by_line=entry["by_line"],
                input_ids=ids.read(4 * entry["tokens"]),
                supervised=mask.read(entry["tokens"]),
                rows=rows.read(ROW.itemsize * entry["rows"]),
                counts=Counter(entry["counts"]),
                rejected=entry["rejected"],
            )
            yield entry["chunk"], chunk


def complete(folder: Path, files: Sequence[str], *, special_ids: Collection[int], about: Mapping[str, Any]) -> None:
    """Writes the ``meta.json`` of a store that has all its chunks.

    Args:
        files: that the rows are from.
        special_ids: ids that are counted.
        about: further entries.
    """
    counts: Counter[str] = Counter()
    rejected: list[str] = []
    by_line = [False] * len(files)
    for entry in read_chunks(folder):
        counts.update(entry["counts"])
        rejected += entry["rejected"][: MAX_REJECTIONS - len(rejected)]
        by_line[entry["file"]] = entry["by_line"]
    digest, special = _digest(folder, special_ids)
    meta = {
        **about,
        "files": list(files),
        "by_line": by_line,
        "counts": dict(sorted(counts.items())),
        "rejected": rejected,
        "digest": digest,
        "special": special,
    }
    unfinished = folder / (META + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / META)


def _digest(folder: Path, special_ids: Collection[int]) -> tuple[str, dict[str, int]]:
    """XXH3-128 of tokens, masks and rows, and how often each of ``special_ids`` stands in the tokens."""
    digest, wanted = xxhash.xxh3_128(), np.array(sorted(special_ids), np.int32)
    special: Counter[str] = Counter()
    for name in (IDS, MASK, ROWS):
        with (folder / name).open("rb") as file:
            while block := file.read(READ_AT_ONCE):
                digest.update(block)
                if name == IDS:
                    part = np.frombuffer(block, np.int32)
                    ids, numbers = np.unique(part[np.isin(part, wanted)], return_counts=True)
                    special.update({str(id): int(number) for id, number in zip(ids, numbers, strict=True)})
    return digest.hexdigest(), dict(sorted(special.items()))


def _cut(path: Path, size: int) -> IO[bytes]:
    """A file to append to, cut to ``size`` bytes."""
    file = path.open("ab")
    file.truncate(size)
    return file


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True).encode() + b"\n"
