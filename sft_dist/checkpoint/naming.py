"""Names in a run directory and in ``checkpoints/``. Standard library only: it is also read outside of a container."""

from __future__ import annotations

import re
from pathlib import Path

CHECKPOINTS, FINAL = "checkpoints", "final"

_COMPLETE = re.compile(r"step-(\d{8,})")


def name_of(completed_steps: int) -> str:
    """``step-00000100``: sorted by name is sorted by step."""
    return f"step-{completed_steps:08d}"


def step_of(name: str) -> int | None:
    """The step in the name of a complete checkpoint; None: it is not called as one."""
    match = _COMPLETE.fullmatch(name)
    return None if match is None else int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest step first."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(found)]


def newest_step(run: Path) -> int:
    """Steps behind the newest complete checkpoint of a run directory; 0: there is none."""
    complete = complete_checkpoints(run / CHECKPOINTS)
    return (step_of(complete[-1].name) or 0) if complete else 0
