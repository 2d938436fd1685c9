"""Writes pages of runs into files. The run itself calls it, beside its training:

python -m sft_dist.report.command RUN_DIR
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sft_dist.cluster.job_of_run import Ask
from sft_dist.errors import ConfigError, SftError
from sft_dist.report.page import render
from sft_dist.report.read import ask_nobody, read_report
from sft_dist.runtime.whole_file import replace_file

# In the run directory.
REPORT = "report.html"


def write_report(run: Path, out: Path | None = None, *, ask: Ask | None = None) -> Path:
    """Writes the page of a run, in one step.

    Args:
        out: the file; None: ``report.html`` in the run directory.
        ask: for the state of the run's job; None: SLURM.

    Raises:
        ConfigError: the folder holds no run, or the file cannot be written.
    """
    page = render(read_report(run, ask=ask))
    path = run / REPORT if out is None else out
    write_page(path, page)
    return path


def write_page(path: Path, page: str) -> None:
    """
    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, page, unfinished=unfinished_page(path, os.getpid()))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror or error})", fix="give a file in a folder you may write"
        ) from error


def unfinished_page(path: Path, pid: int) -> Path:
    """What a process writes before it is the page; one that was killed may leave it."""
    return path.with_name(f".{path.name}.{pid}")


def main(run: Path) -> None:
    """Writes the page of a run that asks for it itself."""
    try:
        write_report(run, ask=ask_nobody)
    except SftError as error:
        sys.exit(error.what)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
