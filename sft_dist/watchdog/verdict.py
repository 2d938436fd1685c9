"""``OUTPUT_DIR/stalls/START``: the verdict and the stacks of a stall. One rank writes the verdict, all leave after it.

    verdict.json        which rank the others waited for, on which host, in which phase, since when
    rank-N.txt          stacks of rank N
    rank-N.nccl         its last collectives, where they are NCCL's

Standard library only, but for what is told.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sft_dist.errors import Stalled
from sft_dist.runtime.slurm_step import own_job_id
from sft_dist.watchdog.judge import Guilty
from sft_dist.watchdog.record import Record

FOLDER, FILE = "stalls", "verdict.json"

# One that reads while another writes comes again.
TRIES, PAUSE_S = 5, 0.2


@dataclass(frozen=True)
class Verdict:
    """The file.

    Args:
        what: in a line.
        ranks: that are at fault; none: all stand at the same place. Of the first: host, phase, part, step (completed),
            since (by its own clock), still_s and limit_s, None where it never said anything.
        is_silent: they do not run, or are gone.
        at: when it was found, ISO 8601 in UTC.
        job_id, restart: of SLURM; restart counts from 0.
        places: what each rank said, by rank.
    """

    what: str
    ranks: tuple[int, ...]
    is_silent: bool
    host: str | None
    phase: str | None
    part: str | None
    step: int | None
    since: str | None
    still_s: float | None
    limit_s: float | None
    at: str
    job_id: str | None
    restart: int
    places: tuple[dict[str, Any] | None, ...]

    @property
    def error(self) -> Stalled:
        """As the run ends with it; ``fix`` is completed by who knows the folder."""
        return Stalled(self.what, fix="go on with --resume auto")


def verdict_of(guilty: Guilty, records: Sequence[Record | None], *, state: str | None = None) -> Verdict:
    """
    Args:
        state: of the silent process by the kernel, in words, where that is known.
    """
    first = records[guilty.ranks[0]] if guilty.ranks else None
    told = first if first is not None or guilty.ranks else _longest(records)
    return Verdict(
        what=_told(guilty, first, told, state),
        ranks=guilty.ranks,
        is_silent=guilty.is_silent,
        host=None if first is None else first.host,
        phase=None if told is None else told.phase,
        part=None if told is None else told.part,
        step=None if told is None else told.step,
        since=None if told is None else told.since,
        still_s=None if told is None else told.still_s,
        limit_s=None if told is None else told.limit_s,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        job_id=own_job_id(),
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        places=tuple(None if each is None else asdict(each) for each in records),
    )


def _longest(records: Sequence[Record | None]) -> Record | None:
    known = [each for each in records if each is not None]
    return max(known, key=lambda each: each.still_s, default=None)


def _told(guilty: Guilty, first: Record | None, told: Record | None, state: str | None) -> str:
    if not guilty.ranks:
        where = "" if told is None else f", {told.where}, since {_clock(told.since)}"
        alone = told is not None and told.rank == 0 and not told.collectives
        who = "this process makes" if alone else "all ranks wait at the same place: none is behind, and none makes"
        return f"{who} no progress{where}" + (_limit(told) if told is not None else "")
    others = f" (and ranks {', '.join(map(str, guilty.ranks[1:]))})" if len(guilty.ranks) > 1 else ""
    if first is None:
        return f"rank {guilty.ranks[0]}{others} has never said what it does, and the others wait for it"
    who = f"rank {first.rank} on {first.host}{others}"
    if first.phase == "ended":
        return f"{who} has ended, and the others still wait for it"
    if guilty.is_silent:
        why = "" if state is None else f": its process is {state}"
        return f"{who} gives no sign of life{why}; it was {first.where}, since {_clock(first.since)}"
    return f"{who} stalls: {first.where}, since {_clock(first.since)}{_limit(first)}; the others wait for it"


def _limit(record: Record) -> str:
    limit = "" if record.limit_s is None else f", more than watchdog.{record.key}_s = {record.limit_s:.0f}"
    return f" ({record.still_s:.0f} s{limit})"


def _clock(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%H:%M:%S} UTC"


def write_first(folder: Path, verdict: Verdict) -> bool:
    """Whether this is the only one: false where another rank has written one.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / FILE).open("x", encoding="utf-8") as file:
            file.write(json.dumps(asdict(verdict), ensure_ascii=False, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def read(folder: Path) -> Verdict | None:
    """None: there is none. Raises ``OSError``, or ``ValueError`` where it is no verdict."""
    for _ in range(TRIES):
        try:
            return Verdict(**_read(folder / FILE))
        except FileNotFoundError:
            return None
        except ValueError:
            time.sleep(PAUSE_S)
    return Verdict(**_read(folder / FILE))


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found | {"ranks": tuple(found["ranks"]), "places": tuple(found["places"])}
