"""Which rank the others wait for, from what all of them say of themselves. Pure; standard library only.

A rank waits if it has called a collective of a process group that others of the group have not called yet. The one that
is behind somewhere and waits nowhere is the one that all wait for, over any number of groups in between: a rank calls
its collectives one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft_dist.watchdog.record import Record

# A rank whose file has not changed for two beats may be one that does not run: not sure yet.
DOUBTFUL_BEATS = 2


@dataclass(frozen=True)
class Guilty:
    """Args:
    ranks: that are at fault; none: all stand at the same place.
    is_silent: they do not run, or are gone.
    """

    ranks: tuple[int, ...]
    is_silent: bool = False


def judge(
    records: Sequence[Record | None], unchanged_s: Sequence[float], *, beat_s: float, silent_s: float
) -> Guilty | None:
    """None: it is not time to end the run, or not sure yet.

    Args:
        records: by rank; None: has written nothing.
        unchanged_s: for how long the reader has seen the same beat of each.
        beat_s: between two beats of a rank that lives.
        silent_s: from here on a rank does not run.
    """
    known = [record for record in records if record is not None]
    waiting_s = [record.is_over for record in known]
    if not any(waiting_s):
        return None
    silent = tuple(
        rank
        for rank, record in enumerate(records)
        if unchanged_s[rank] >= silent_s or (record is not None and record.phase == "ended")
    )
    if silent:
        return Guilty(silent, is_silent=True)
    if len(known) < len(records) or max(unchanged_s) >= DOUBTFUL_BEATS * beat_s:
        return None
    behind = behind_the_others(known)
    if not behind:
        return Guilty(()) if all(waiting_s) else None
    # One that is slow within its own limit is let be.
    return Guilty(tuple(sorted(each.rank for each in behind))) if all(each.is_over for each in behind) else None


def behind_the_others(records: Sequence[Record]) -> list[Record]:
    """Those that the others wait for; none where all stand at the same place."""
    late, waiting = _by_collectives(records)
    if late:
        return [each for each in records if each.rank in late - waiting] or _least(records, late)
    at_work = [each for each in records if each.part != "rank 0"]
    if len(at_work) < len(records):
        return at_work
    least = min(each.step or 0 for each in records)
    slow = [each for each in records if (each.step or 0) == least]
    if len(slow) < len(records):
        return slow
    without_data = [each for each in records if each.part == "data"]
    return without_data if len(without_data) < len(records) else []


def _by_collectives(records: Sequence[Record]) -> tuple[set[int], set[int]]:
    """Ranks that are behind in a group, and ranks that wait in one."""
    late: set[int] = set()
    waiting: set[int] = set()
    for group in {name for each in records for name in each.collectives}:
        called = {each.rank: each.collectives[group] for each in records if group in each.collectives}
        most = max(called.values())
        missing = {rank for rank, count in called.items() if count < most}
        late |= missing
        waiting |= called.keys() - missing if missing else set()
    return late, waiting


def _least(records: Sequence[Record], late: set[int]) -> list[Record]:
    """Where each waits for another: those that have called the fewest."""
    counts = {each.rank: sum(each.collectives.values()) for each in records if each.rank in late}
    return [each for each in records if counts.get(each.rank) == min(counts.values())]
