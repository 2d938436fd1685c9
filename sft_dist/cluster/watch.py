"""``sft-dist status``: once, again and again, as JSON, or as an exit code; of a run, or of all points of a sweep."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from sft_dist.cluster.attempts import FOLDER
from sft_dist.cluster.status import Status, is_run, read_status, status_json
from sft_dist.cluster.status_view import details, headline, sweep_view
from sft_dist.cluster.verdict import SILENT_S

EVERY_S = 2.0

# Nothing more happens by itself.
OVER = ("finished", "failed", "ended", "stopped")

# Of a submission: the runs that were submitted together, each in a folder of its own below this one.
SWEEP = "sweep.json"


def points_of(folder: Path) -> list[str]:
    """Names of the folders of a sweep's points; none where the folder is that of a run."""
    names: dict[str, None] = {}
    for path in sorted(folder.glob(f"{FOLDER}/submission-*/{SWEEP}")):
        names |= {point["name"]: None for point in json.loads(path.read_text(encoding="utf-8"))["points"]}
    return list(names)


def show_status(folder: Path, *, as_json: bool, console: Console | None = None) -> None:
    """Prints how a run stands, as ``read_status`` reads it."""
    console = console or Console(highlight=False)
    points = _points(folder)
    if as_json:
        document: Any = status_json(read_status(folder)) if points is None else _points_json(points)
        print(json.dumps(document, indent=1, ensure_ascii=False))
    elif points is not None:
        console.print(sweep_view(points))
    else:
        status = read_status(folder)
        # A narrow terminal wraps it, a file and `head -1` get it whole.
        console.print(headline(status), soft_wrap=True)
        console.print(details(status, console))


def _points(folder: Path) -> dict[str, Status | None] | None:
    """None: the folder is no sweep's."""
    names = points_of(folder)
    if not names:
        return None
    return {name: read_status(folder / name) if is_run(folder / name) else None for name in names}


def _points_json(points: dict[str, Status | None]) -> dict[str, Any]:
    return {"points": {name: None if status is None else status_json(status) for name, status in points.items()}}


def watch_status(folder: Path, *, console: Console | None = None, every_s: float = EVERY_S) -> None:
    """Shows it until the run is over; without a terminal, a line whenever the verdict changes."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        _print_changes(folder, console, every_s)
        return
    view, is_over = _look(folder, console)
    with Live(view, console=console, auto_refresh=False) as live:
        live.refresh()
        while not is_over:
            time.sleep(every_s)
            view, is_over = _look(folder, console)
            live.update(view, refresh=True)


def _look(folder: Path, console: Console) -> tuple[RenderableType, bool]:
    points = _points(folder)
    if points is not None:
        return sweep_view(points), all(each is not None and each.verdict.kind in OVER for each in points.values())
    status = read_status(folder)
    return Group(headline(status), details(status, console)), status.verdict.kind in OVER


def _print_changes(folder: Path, console: Console, every_s: float) -> None:
    said = None
    while True:
        line, is_over, _ = _in_short(folder, SILENT_S)
        if line != said:
            said = line
            console.print(line, soft_wrap=True, markup=False)
        if is_over:
            return
        time.sleep(every_s)


def _in_short(folder: Path, silent_s: float) -> tuple[str, bool, bool]:
    """A line, whether it is over, and whether somebody should look."""
    names = points_of(folder)
    if not names:
        verdict = read_status(folder, silent_s=silent_s).verdict
        return verdict.line, verdict.kind in OVER, verdict.is_trouble
    begun = [read_status(folder / name, silent_s=silent_s).verdict for name in names if is_run(folder / name)]
    kinds = Counter(verdict.kind for verdict in begun)
    counts = [f"{count} {kind}" for kind, count in kinds.items()]
    if len(begun) < len(names):
        counts.append(f"{len(names) - len(begun)} not begun")
    is_over = len(begun) == len(names) and all(kind in OVER for kind in kinds)
    return f"{len(names)} points: {', '.join(counts)}", is_over, any(verdict.is_trouble for verdict in begun)


def check_status(folder: Path, *, silent_s: float = SILENT_S) -> bool:
    """Prints one line, and returns whether nobody needs to look: for cron."""
    line, _, is_trouble = _in_short(folder, silent_s)
    print(f"{folder}: {line}")
    return not is_trouble
