"""What each rank tells the others without a collective: a small file in OUTPUT_DIR/heartbeats/START, replaced whole.

    rank-2.json         what it is doing, and how far it is; a thread of its writes it
    rank-2.stacks       its stacks, where it holds the interpreter and cannot say anything itself

START names the start of these processes, so one that looks for another start finds nothing of this one.
Standard library only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Record:
    """A rank, as it says.

    Args:
        beat: counts up with every writing; one that stays tells of a process that does not run.
        host, pid, born: of the process; born by psutil's create_time, so that a number that is used again is known.
        phase: of the heartbeat, or "ended".
        part: of ``runtime/progress.py``.
        key: the limit that counts here; "" where none does.
        step: completed.
        still_s: since its last progress, without time in which it was suspended.
        since: when that was, ISO 8601 in UTC by the clock of its host.
        limit_s: of where it is; None: it may stay there.
        collectives: how many it has called, by process group.
    """

    rank: int
    beat: int
    host: str
    pid: int
    born: float
    phase: str
    part: str
    key: str
    step: int | None
    still_s: float
    since: str
    limit_s: float | None
    collectives: dict[str, int] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        """Whether it has made no progress for longer than it may."""
        return self.limit_s is not None and self.still_s >= self.limit_s

    @property
    def where(self) -> str:
        """In words: ``waiting for its data, after step 119``."""
        doing = {"data": "waiting for its data", "rank 0": "waiting for rank 0"}.get(self.part) or self.phase
        return doing + ("" if self.step is None else f", after step {self.step:,}")


def record_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def stacks_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stacks"


def write(folder: Path, record: Record) -> None:
    """Raises ``OSError``; what was there before is there then."""
    folder.mkdir(parents=True, exist_ok=True)
    path = record_file(folder, record.rank)
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(asdict(record)), encoding="utf-8")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)  # a full disk has room for others then
        raise


def read_all(folder: Path, size: int) -> list[Record | None]:
    """By rank; None for one that has written nothing."""
    return [_read(record_file(folder, rank)) for rank in range(size)]


def _read(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def forget(folder: Path, rank: int) -> None:
    """At the end of a rank; the last one removes the folder."""
    for path in (record_file(folder, rank), stacks_file(folder, rank)):
        path.unlink(missing_ok=True)
    for each in (folder, folder.parent):
        try:
            each.rmdir()
        except OSError:  # of a rank that is still there
            return
