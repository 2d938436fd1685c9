"""What the launchers of a job's nodes leave for who looks after the job: files in the folder $SFT_DIST_JOB_NOTES.

    began-NODE            a launcher has started on the node with this number in the step; text: the node's host name
    exit-NODE             it ended; text: its exit code
    began-NODE.TASK       with plain srun, where each task trains: the same for each task, TASK = 0, 1, ... on its node
    exit-NODE.TASK

One that began and left no exit code was ended by SIGKILL, or its machine went down. Written in place of what an earlier
one left. The standard library alone: it is also read outside of a container.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

FOLDER = "SFT_DIST_JOB_NOTES"
BEGAN, EXIT = "began-", "exit-"
UNEXPECTED_EXIT_CODE = 1
INTERRUPTED_EXIT_CODE = 130


def begin(folder: Path, node: int, *, task: int | None = None) -> None:
    """Notes that a launcher begins on this host, in place of all that an earlier one noted.

    Args:
        folder: made if need be.
        node: its number in the step.
        task: on its node, where each task is one of the training's processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _name(EXIT, node, task)).unlink(missing_ok=True)
    _write(folder, _name(BEGAN, node, task), socket.gethostname())


def write(folder: Path, node: int, code: int, *, task: int | None = None) -> None:
    """Notes the exit code; arguments as of ``begin``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, _name(EXIT, node, task), str(code))


def _name(kind: str, node: int, task: int | None) -> str:
    return f"{kind}{node}" if task is None else f"{kind}{node}.{task}"


def _write(folder: Path, name: str, text: str) -> None:
    part = folder / f".{name}.part"
    part.write_text(text, encoding="utf-8")
    part.replace(folder / name)


def read(folder: Path) -> dict[int, list[int | None]]:
    """Exit codes by node, of its launcher or of its tasks in order; None where one began and did not say how it ended.

    A node on which nothing began is not there.
    """
    notes = {file.name for file in folder.glob(f"{BEGAN}*")} | {file.name for file in folder.glob(f"{EXIT}*")}
    places = sorted({_place(name) for name in notes})
    codes: dict[int, list[int | None]] = {}
    for node, task in places:
        file = folder / _name(EXIT, node, None if task < 0 else task)
        codes.setdefault(node, []).append(int(file.read_text(encoding="utf-8")) if file.exists() else None)
    return codes


def hosts(folder: Path) -> dict[int, str]:
    """Host names by node."""
    return {_place(file.name)[0]: file.read_text(encoding="utf-8").strip() for file in folder.glob(f"{BEGAN}*")}


def _place(name: str) -> tuple[int, int]:
    node, _, task = name.partition("-")[2].partition(".")
    return int(node), int(task) if task else -1


# Of this process, while ``noting`` lasts: folder, node, task.
_own: tuple[Path, int, int | None] | None = None


def leave(code: int) -> NoReturn:
    """Ends this process at once, past everything that unwinds, and notes the code if it is to note one."""
    if _own is not None:
        folder, node, task = _own
        with _told(folder):
            write(folder, node, code, task=task)
    os._exit(code)


@contextmanager
def noting(node: int, *, task: int | None = None) -> Iterator[None]:
    """Notes the beginning, and the exit code with which this process is about to end; where the variable is set.

    A folder that cannot be written is told, and ends nothing.
    """
    name = os.environ.get(FOLDER)
    if not name:
        yield
        return
    global _own
    folder, code = Path(name), 0
    with _told(folder):
        begin(folder, node, task=task)
    _own = folder, node, task
    try:
        yield
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except KeyboardInterrupt:
        code = INTERRUPTED_EXIT_CODE
        raise
    except BaseException:
        code = UNEXPECTED_EXIT_CODE
        raise
    finally:
        _own = None
        with _told(folder):
            write(folder, node, code, task=task)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"{FOLDER}: {folder} cannot be written: {error.strerror}", file=sys.stderr)
