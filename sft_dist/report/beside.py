"""The page of a run, kept up to date while it trains: a process of its own writes it, so that no step waits for it.

Whatever goes wrong with it is told once, and ends nothing.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import sft_dist
from sft_dist.errors import SftError
from sft_dist.report.command import REPORT, unfinished_page, write_report
from sft_dist.report.read import ask_nobody

# A process that takes longer than this is stuck: its disk does not answer.
PATIENCE_S = 300.0

# How long a process may take to be gone once it is killed.
END_S = 5.0

# Of a core: where evaluations follow each other quickly, not each of them gets a page.
SHARE = 0.01

# Below everything else on the machine.
NICENESS = 19

# Variables of a launcher: what this process starts is no rank.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")


class Page:
    """That of one run, of its rank 0.

    Args:
        folder: the run directory.
        say: told once when the page cannot be written.
        command: that writes it.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, command: tuple[str, ...] | None = None) -> None:
        self._folder, self._say, self._has_told = folder, say, False
        self._command = command or (sys.executable, "-m", "sft_dist.report.command", str(folder))
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._has_begun = 0.0, False
        self._cpu_s = 0.0  # of the last one

    def refresh(self) -> None:
        """Begins to write it and waits for nothing.

        Nothing is begun while one is being written, nor while the last has cost more than ``SHARE`` of the time since.
        """
        self._has_begun = True
        if self._process is not None and not self._is_over(self._process):
            return
        if self._started and self._cpu_s > SHARE * (time.monotonic() - self._started):
            return
        try:
            self._process = subprocess.Popen(
                self._command, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, process_group=0,
            )  # fmt: skip
            self._started = time.monotonic()
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        except OSError as error:
            self._tell(error.strerror or str(error))

    def close(self) -> None:
        """Writes it for the last time, now that the run is over; a run that has not begun gets none."""
        if self._process is not None and self._process.poll() is None:
            self._end(self._process)  # what it would write is old already
        if not self._has_begun:
            return
        try:
            write_report(self._folder, ask=ask_nobody)
        except SftError as error:
            self._tell(error.what)
        except Exception as error:  # whatever it is, the run is done
            self._tell(f"{type(error).__name__}: {error}")

    def _is_over(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether a process has ended, or is ended here because it takes too long; what went wrong is told."""
        before_s = _children_cpu_s()
        if process.poll() is None:
            if time.monotonic() - self._started < PATIENCE_S:
                return False
            self._process, self._cpu_s = None, 0.0
            self._end(process)
            self._tell(f"nothing came of it within {PATIENCE_S:.0f} s")
            return True
        self._process, self._cpu_s = None, _children_cpu_s() - before_s
        assert process.stderr is not None
        with process.stderr as stream:
            printed = stream.read().decode(errors="replace").strip().splitlines()
        if process.returncode:
            self._tell((printed or [f"exit code {process.returncode}"])[-1])
        return True

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        with suppress(subprocess.TimeoutExpired):  # it waits for a disk that does not answer
            process.wait(END_S)
        with suppress(OSError):
            unfinished_page(self._folder / REPORT, process.pid).unlink()

    def _tell(self, why: str) -> None:
        if not self._has_told:
            self._has_told = True
            self._say(f"{self._folder / REPORT} cannot be written ({why}); `sft-dist report` writes it later")


def _children_cpu_s() -> float:
    """User and system seconds of the processes that this one has started and seen the end of."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment() -> dict[str, str]:
    """Of this process, with this package and without what makes a process a rank."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_RANK)}
    package = str(Path(sft_dist.__file__).parents[1])
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
