"""``sft-dist doctor``: examined, shown, written down."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sft_dist.doctor.examine import Effort, Say, examine
from sft_dist.doctor.finding import Verdict, worst_first
from sft_dist.doctor.meeting import Clock
from sft_dist.doctor.place import Place
from sft_dist.doctor.report import console_for_output, render
from sft_dist.doctor.wanted import Wanted
from sft_dist.errors import ConfigError, MachineError
from sft_dist.runtime import exit_notes

# In the folder in which a job collects what is to be known of an attempt.
FILE = "doctor.json"

TERMINATED_EXIT_CODE = 128 + signal.SIGTERM


def doctor(place: Place, wanted: Wanted, *, effort: Effort, json_file: Path | None, clock: Clock = time.time) -> int:
    """Examines this node among the others; the first one shows the verdict.

    Args:
        json_file: to write the verdict to, on the first node.

    Returns:
        The exit code, the same on all nodes.

    Raises:
        MachineError: on the first node, where training would fail; on another one, where it did not reach the first.
        ConfigError: the verdict cannot be written.
    """
    with _ending_on_sigterm():
        say = _teller()
        code, verdict = examine(place, wanted, effort=effort, say=say, clock=clock)
        say("")
    if verdict is not None:
        render(verdict, console_for_output())
        for file in _files(json_file):
            _write(verdict, file)
        if code:
            raise _error(verdict)
    return code


def _files(json_file: Path | None, env: Mapping[str, str] = os.environ) -> list[Path]:
    notes = env.get(exit_notes.FOLDER)
    return [*([json_file] if json_file else []), *([Path(notes) / FILE] if notes else [])]


def _write(verdict: Verdict, file: Path) -> None:
    part = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(verdict.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        if verdict.exit_code:  # what is wrong with the machines says more than that it cannot be noted
            print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
            return
        raise ConfigError(
            f"{file} cannot be written: {error.strerror}", fix="give another file, or make room"
        ) from error


def _error(verdict: Verdict) -> MachineError:
    failed = [finding for finding in worst_first(verdict.findings) if finding.level == "failed"]
    first = failed[0]
    where = f"{first.node}: " if first.node else ""
    others = f" (and {len(failed) - 1} more, above)" if len(failed) > 1 else ""
    return MachineError(f"training would fail: {where}{first.check}: {first.what}{others}", fix=first.fix)


def _teller() -> Say:
    """Says what goes on, with the seconds since the start: on one line of a terminal, or line by line in a log."""
    began = time.monotonic()
    before, after = ("\r\x1b[2K", "") if sys.stderr.isatty() else ("", "\n")

    def say(what: str) -> None:
        sys.stderr.write(f"{before}doctor: {time.monotonic() - began:4.1f} s  {what}{after}" if what else before)
        sys.stderr.flush()

    return say


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """SIGTERM ends the doctor as Ctrl-C does: with its processes and files."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(TERMINATED_EXIT_CODE)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
