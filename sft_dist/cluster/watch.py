"""``sft-dist status``: once, again and again, as JSON, or as an exit code."""

from __future__ import annotations

import json
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from sft_dist.cluster.status import Status, read_status, status_json
from sft_dist.cluster.status_view import render_status
from sft_dist.cluster.verdict import SILENT_S

EVERY_S = 2.0

# Nothing more happens by itself.
OVER = ("finished", "failed", "ended", "stopped")


def show_status(folder: Path, *, as_json: bool, console: Console | None = None) -> None:
    """Prints how a run stands, as ``read_status`` reads it."""
    status = read_status(folder)
    console = console or Console(highlight=False)
    if as_json:
        print(json.dumps(status_json(status), indent=1, ensure_ascii=False))
    else:
        console.print(render_status(status, console))


def watch_status(folder: Path, *, console: Console | None = None, every_s: float = EVERY_S) -> None:
    """Shows it until the run is over; without a terminal, a line whenever the verdict changes."""
    console = console or Console(highlight=False)
    status = read_status(folder)
    if not console.is_terminal:
        _print_changes(folder, status, console, every_s)
        return
    with Live(render_status(status, console), console=console, auto_refresh=False) as live:
        while status.verdict.kind not in OVER:
            time.sleep(every_s)
            status = read_status(folder)
            live.update(render_status(status, console), refresh=True)


def _print_changes(folder: Path, status: Status, console: Console, every_s: float) -> None:
    said = None
    while True:
        if status.verdict.line != said:
            said = status.verdict.line
            console.print(said, soft_wrap=True, markup=False)
        if status.verdict.kind in OVER:
            return
        time.sleep(every_s)
        status = read_status(folder)


def check_status(folder: Path, *, silent_s: float = SILENT_S) -> bool:
    """Prints one line, and returns whether nobody needs to look: for cron."""
    status = read_status(folder, silent_s=silent_s)
    print(f"{folder}: {status.verdict.line}")
    return not status.verdict.is_trouble
