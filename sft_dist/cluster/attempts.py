"""``slurm/attempts.jsonl`` of a run directory: one line when a start of the training job begins, one when it ends.

    {"event": "began", "job": "12", "restart": 0, "at": 1765432100.5, "nodes": ["gpu1", "gpu2"], "step": 0}
    {"event": "ended", "job": "12", "restart": 0, "at": 1765435700.5, "code": 75, "step": 400,
     "decision": "requeue", "reason": "...", "blamed": []}

Times are seconds since 1970 (UTC); ``step`` is that of the newest complete checkpoint. A start that could not tell of
its end gets its second line when the next one begins, with null for what nobody knows. Lines are only ever appended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER, FILE, NOTES = "slurm", "attempts.jsonl", "notes"

# What was decided at the end.
DONE, REQUEUE, GIVE_UP, LEAVE, LOST = "done", "requeue", "give up", "leave", "lost"


@dataclass(frozen=True)
class Attempt:
    """One start of the training job.

    Args:
        nodes: host names, in the job's order.
        began, ended: seconds since 1970.
        code: exit code, of the processes' and launchers' the one that counts.
        step_before, step_after: of the newest complete checkpoint.
        decision: "done"; "requeue": it asked for the next start; "give up"; "leave": SLURM or a user had decided
            already; "lost": it never told of its end.
        reason: of the decision, in words.
        blamed: nodes that it failed on.
        is_fruitless: whether it counts among those that got no further, of which there may be some in a row only.
    """

    job: str
    restart: int
    nodes: tuple[str, ...]
    began: float
    step_before: int
    ended: float | None = None
    code: int | None = None
    step_after: int | None = None
    decision: str | None = None
    reason: str | None = None
    blamed: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether it runs, or ended without a word."""
        return self.decision is None


def attempts_file(run: Path) -> Path:
    return run / FOLDER / FILE


def notes_folder(run: Path, job: str, restart: int) -> Path:
    """Where the launchers of an attempt and the doctor leave what they found."""
    return run / FOLDER / NOTES / f"{job}-{restart}"


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts of a run directory, of all its jobs, the oldest first."""
    found: dict[tuple[str, int], Attempt] = {}
    for entry in _entries(attempts_file(run)):
        key = entry["job"], entry["restart"]
        if entry["event"] == "began":
            nodes = tuple(entry["nodes"])
            found[key] = Attempt(*key, nodes=nodes, began=entry["at"], step_before=entry["step"])
        elif key in found:
            end = {"ended": entry["at"], "step_after": entry["step"], "blamed": tuple(entry["blamed"])}
            rest = {name: entry[name] for name in ("code", "decision", "reason")}
            found[key] = Attempt(**(_fields(found[key]) | end | rest))
    return list(found.values())


def note_begin(run: Path, job: str, restart: int, nodes: Sequence[str], *, step: int) -> Attempt:
    """Appends that an attempt begins."""
    now = time.time()
    _append(run, {"event": "began", "job": job, "restart": restart, "at": now, "nodes": list(nodes), "step": step})
    return Attempt(job, restart, tuple(nodes), now, step)


def note_end(
    run: Path,
    attempt: Attempt,
    *,
    code: int | None,
    step: int,
    decision: str,
    reason: str,
    blamed: Sequence[str] = (),
) -> Attempt:
    """Appends how an attempt ended; ``code`` None: nobody knows, nor when."""
    now = None if code is None else time.time()
    entry = {
        "event": "ended", "job": attempt.job, "restart": attempt.restart, "at": now, "code": code, "step": step,
        "decision": decision, "reason": reason, "blamed": list(blamed),
    }  # fmt: skip
    _append(run, entry)
    end = {"ended": now, "code": code, "step_after": step, "decision": decision, "reason": reason}
    return Attempt(**(_fields(attempt) | end | {"blamed": tuple(blamed)}))


def _fields(attempt: Attempt) -> dict[str, Any]:
    return asdict(attempt)


def _append(run: Path, entry: dict[str, Any]) -> None:
    """One line, on the disk when this returns, and apart from one that a dying process did not finish."""
    path = attempts_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        is_cut = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            is_cut = file.read(1) != b"\n"
        file.write((b"\n" if is_cut else b"") + json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # cut short by a dying process
    return entries
