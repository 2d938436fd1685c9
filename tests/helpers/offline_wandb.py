"""Reads what W&B writes offline: ``wandb/offline-run-DATE-ID/run-ID.wandb``, records in the log format of LevelDB."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES, RECORD_HEADER_BYTES = 7, 32768, 7
FULL, LAST = 1, 4  # a record that ends here; others go on in the next block


@dataclass(frozen=True)
class OfflineRun:
    """One folder, of one start.

    Args:
        steps: of its metrics, as they came.
        exit_code: None: it was never told of the end.
        tables: the newest of each name: the step that it was given at, and its rows.
        summary: what it was told to put there.
    """

    id: str
    steps: list[int]
    exit_code: int | None
    tables: dict[str, tuple[int, list[list[Any]]]] = field(default_factory=dict, compare=False)
    summary: dict[str, Any] = field(default_factory=dict, compare=False)


def offline_runs(run_directory: Path) -> list[OfflineRun]:
    """Of a run directory, the oldest first."""
    return [
        _read(file)
        for file in sorted(run_directory.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    ]


def _read(file: Path) -> OfflineRun:
    records = list(_records(file.read_bytes()))
    history = [
        {_key(item): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    tables = {
        key.removesuffix("/_type"): (line["_step"], _rows(file.parent / "files" / line[key.replace("/_type", "/path")]))
        for line in history
        for key, value in line.items()
        if value == "table-file"
    }
    told = [record.summary.update for record in records if record.WhichOneof("record_type") == "summary"]
    summary = {_key(item): json.loads(item.value_json) for items in told for item in items}
    codes = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
    return OfflineRun(
        file.stem.removeprefix("run-"), [line["_step"] for line in history], codes[-1] if codes else None, tables,
        summary,
    )  # fmt: skip


def _rows(table: Path) -> list[list[Any]]:
    rows: list[list[Any]] = json.loads(table.read_text())["data"]
    return rows


def _key(item: Any) -> str:
    return str(item.key or "/".join(item.nested_key))


def _records(data: bytes) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    position, parts = HEADER_BYTES, b""
    while position + RECORD_HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        size, kind = struct.unpack_from("<HB", data, position + 4)  # behind a checksum
        if left < RECORD_HEADER_BYTES or kind == 0:
            position += left
            continue
        position += RECORD_HEADER_BYTES
        parts += data[position : position + size]
        position += size
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
            parts = b""
