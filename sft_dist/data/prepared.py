"""Tokenised rows on disk, packed: written once by one process, mapped into memory by all.

A folder holds ``input_ids.bin`` (int32) and ``supervised.bin`` (uint8), all rows one after the other, and
``index.npz`` with the rows' lengths and the packs. Mapping costs no memory per rank beyond the page cache they share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sft_dist.config.schema import DataConfig, SourceConfig
from sft_dist.data.messages import Conversation
from sft_dist.data.packing import Packs, pack_best_fit
from sft_dist.data.sources import read_source
from sft_dist.errors import DataError

if TYPE_CHECKING:
    from sft_dist.data.chat_template import ChatRenderer, TokenizedRow


# Tokens.
SEARCHED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class PreparedData:
    """Rows and packs of one data set.

    Args:
        input_ids: [all tokens] int32.
        supervised: [all tokens] uint8, 1 where the token is trained on.
        row_bounds: [rows + 1] int64, offsets of the rows in both.
        packs: the rows of each sequence.
        num_tokens: [sequences] int64.
        num_supervised: [sequences] int64; the first token of a row is never predicted and never counts.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.uint8]
    row_bounds: NDArray[np.int64]
    packs: Packs
    num_tokens: NDArray[np.int64]
    num_supervised: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.row_bounds) - 1

    @property
    def num_sequences(self) -> int:
        return len(self.packs)

    def occurring(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids`` that some row has, ascending."""
        wanted, found = np.array(sorted(ids), np.int32), set()
        for start in range(0, len(self.input_ids), SEARCHED_AT_ONCE):
            part = self.input_ids[start : start + SEARCHED_AT_ONCE]
            found.update(np.unique(part[np.isin(part, wanted)]).tolist())
        return sorted(found)

    def row(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """(input_ids [t], supervised [t]) of a row."""
        part = slice(self.row_bounds[number], self.row_bounds[number + 1])
        return self.input_ids[part], self.supervised[part]


def prepare(
    sources: Iterable[SourceConfig],
    data: DataConfig,
    renderer: ChatRenderer,
    folder: Path,
    *,
    key: str,
    on_row: Callable[[], None] = lambda: None,
) -> Counter[str]:
    """Tokenises, masks and packs ``sources`` into ``folder``.

    Args:
        key: of the configuration, for messages (``data.train``).
        on_row: called after every row, for a progress display.

    Returns:
        counts: rows; dropped_rows (over-long), unanswered_rows (nothing supervised left after truncation),
        truncated_rows, truncated_tokens; rewritten_rows (see ``ChatRenderer.rewritten_rows``).

    Raises:
        DataError: a source cannot be read, a row is over-long under ``over_length: error``, or nothing is left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    rewritten_before = renderer.rewritten_rows
    lengths: list[int] = []
    supervised: list[int] = []
    with (folder / "input_ids.bin").open("wb") as ids_file, (folder / "supervised.bin").open("wb") as mask_file:
        for source in sources:
            for conversation in read_source(source):
                on_row()
                row = _fit(renderer.render(conversation), conversation, data, counts)
                if row is not None:
                    lengths.append(len(row[0]))
                    supervised.append(_write_row(row, ids_file, mask_file))
    counts["rows"] = len(lengths)
    counts["rewritten_rows"] = renderer.rewritten_rows - rewritten_before
    if not lengths:
        num_lost = counts["dropped_rows"] + counts["unanswered_rows"]
        raise DataError(
            f"{key}: none of {num_lost} rows is left after data.over_length={data.over_length}",
            fix=f"raise data.max_seq_len above {data.max_seq_len}, or shorten the prompts",
        )
    packs = pack_best_fit(lengths, data.max_seq_len) if data.packing == "best_fit" else Packs.single(len(lengths))
    np.savez(
        folder / "index.npz",
        lengths=np.array(lengths, np.int64),
        supervised=np.array(supervised, np.int64),
        pack_rows=packs.rows,
        pack_bounds=packs.bounds,
    )
    return counts


def open_prepared(folder: Path) -> PreparedData:
    """Maps what ``prepare`` wrote."""
    with np.load(folder / "index.npz") as index:
        lengths, supervised = index["lengths"], index["supervised"]
        packs = Packs(index["pack_rows"], index["pack_bounds"])
    return PreparedData(
        input_ids=np.memmap(folder / "input_ids.bin", np.int32, mode="r"),
        supervised=np.memmap(folder / "supervised.bin", np.uint8, mode="r"),
        row_bounds=np.concatenate([[0], np.cumsum(lengths)]),
        packs=packs,
        num_tokens=packs.sums(lengths),
        num_supervised=packs.sums(supervised),
    )


def _fit(
    row: TokenizedRow, conversation: Conversation, data: DataConfig, counts: Counter[str]
) -> tuple[list[int], list[bool]] | None:
    """The row as it is trained, or None when it is dropped; counts what happened to it."""
    ids, supervised = list(row.input_ids), list(row.supervised)
    if not any(supervised[1:]):
        raise DataError(
            f"{conversation.origin}: no token of the row would be trained on, every label is masked",
            fix="give the row an answer, or check that the chat template renders the assistant's turns",
        )
    excess = len(ids) - data.max_seq_len
    if excess <= 0:
        return ids, supervised
    if data.over_length == "error":
        raise DataError(
            f"{conversation.origin}: the row has {len(ids)} tokens, more than data.max_seq_len={data.max_seq_len}",
            fix="raise data.max_seq_len, or set data.over_length to truncate or drop",
        )
    ids, supervised = ids[:-excess], supervised[:-excess]
    if data.over_length == "drop" or not any(supervised[1:]):
        counts["dropped_rows" if data.over_length == "drop" else "unanswered_rows"] += 1
        return None
    counts["truncated_rows"] += 1
    counts["truncated_tokens"] += excess
    return ids, supervised


def _write_row(row: tuple[list[int], list[bool]], ids_file: BinaryIO, mask_file: BinaryIO) -> int:
    """Appends a row; returns its number of supervised tokens."""
    ids, supervised = row
    ids_file.write(np.array(ids, np.int32).tobytes())
    mask_file.write(np.array(supervised, np.uint8).tobytes())
    return sum(supervised[1:])
