"""What each rank prints, kept in OUTPUT_DIR/logs/ATTEMPT/rank-R.log: at the level of file descriptors, so that it has
what libraries in C++ print and the stack of a crash. Rank 0 prints on the screen as well, the others only their errors.

For a process that is one of several, at its very start. Imports no torch.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TextIO

import psutil

from sft_dist.runtime.slurm_step import own_job_id
from sft_dist.runtime.world import World, restarts

FOLDER = "logs"  # in output_dir
STDOUT, STDERR = 1, 2

# Copies to the screen and to a file. SLURM signals every process of a step, and a terminal its process group: what is
# printed after that is to be seen, too. It ends when the last writer has.
COPY = """trap '' HUP INT QUIT PIPE TERM USR1 USR2; exec tee -a "$0" """
COPIED_WITHIN_S = 2.0


class Store(Protocol):
    """What is used of torch's."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...


@dataclass
class _Kept:
    """Args:
    file: of this rank.
    screen: where stderr led before; None on rank 0, whose stderr still leads there.
    """

    file: Path
    screen: TextIO | None = None


_kept: _Kept | None = None

# Of rank 0: where its streams led before, and what copies them.
_screens: dict[int, int] = {}
_copies: list[subprocess.Popen[bytes]] = []


def other_screen() -> TextIO | None:
    """Where errors are to be shown beside ``sys.stderr``; None where that is shown itself."""
    return None if _kept is None else _kept.screen


def keep(output_dir: Path, world: World) -> None:
    """From now on, what this process and its children print is kept; rank 0 says where.

    A folder that cannot be written is told in one line, and all is printed as before.

    Args:
        output_dir: of the run.
        world: of several processes.
    """
    global _kept
    file = output_dir / FOLDER / attempt_of_the_launch() / f"rank-{world.rank}.log"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as log:
            log.write(_heading(world))
        copies = world.is_main and shutil.which("tee") is not None
        if world.is_main and not copies:
            raise FileNotFoundError("there is no program `tee` to copy what rank 0 prints")
    except OSError as error:
        if world.local_rank == 0:
            print(f"warning: what the ranks print is not kept in {file.parent}: {error}", file=sys.stderr, flush=True)
        return
    faulthandler.enable()
    if world.is_main:
        print(f"logs      {file} to rank-{world.size - 1}.log", flush=True)
        _kept = _Kept(file)
        _copy(file)
    else:
        _kept = _Kept(file, screen=os.fdopen(os.dup(STDERR), "w", encoding="utf-8", errors="replace"))
        _lead_into(file)


def settle(store: Store, world: World) -> None:
    """Brings the files of all ranks into one folder; every rank calls it as soon as they have met.

    Without SLURM an attempt is called by the time at which its launcher started, and each node has its own.
    """
    if world.is_main:
        store.set(FOLDER, _kept.file.parent.name if _kept is not None else "")
    if world.is_main or _kept is None:
        return
    name = store.get(FOLDER).decode()
    if not name or name == _kept.file.parent.name:
        return
    old, new = _kept.file, _kept.file.parents[1] / name / _kept.file.name
    new.parent.mkdir(exist_ok=True)
    with new.open("ab") as log:
        log.write(old.read_bytes())
    _lead_into(new)
    _kept.file = new
    old.unlink()
    with suppress(OSError):  # of another rank that is still there
        old.parent.rmdir()


def attempt_of_the_launch(env: Mapping[str, str] = os.environ) -> str:
    """JOB-RESTART under SLURM; else the UTC time at which the launcher of this node started."""
    job = own_job_id(env)
    if job is not None:
        return f"{job}-{env.get('SLURM_RESTART_COUNT', '0')}"
    started = psutil.Process(os.getppid()).create_time()
    return datetime.fromtimestamp(started, UTC).strftime("%Y%m%dT%H%M%SZ")


def _heading(world: World) -> str:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    place = f"rank {world.rank} of {world.size}, local rank {world.local_rank} on {socket.gethostname()}"
    again = f", restart {restarts()}" if restarts() else ""
    network = os.environ.get("GLOO_SOCKET_IFNAME")
    return f"--- {now}: {place}, process {os.getpid()}{again}{f', network {network}' if network else ''}\n"


def _lead_into(file: Path) -> None:
    _flush()
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, STDOUT)
    os.dup2(descriptor, STDERR)
    os.close(descriptor)
    # As on a screen: a line is there when it is printed.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _copy(file: Path) -> None:
    """Both of this process's streams, to where they led and into ``file``.

    A terminal stays one, with its progress bars: then what is printed to stdout is seen there only.
    """
    _flush()
    streams = [STDERR]
    if os.isatty(STDOUT):
        with file.open("a", encoding="utf-8") as log:
            log.write("--- stdout is a terminal and not kept; what follows is stderr\n")
    else:
        streams.append(STDOUT)
    screens = {stream: os.dup(stream) for stream in streams}
    same = len(streams) == 2 and os.path.sameopenfile(STDOUT, STDERR)
    copies = []
    for group in [streams] if same else [[stream] for stream in streams]:
        copy = subprocess.Popen(
            ["sh", "-c", COPY, str(file)],
            stdin=subprocess.PIPE,
            stdout=screens[group[0]],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert copy.stdin is not None
        for stream in group:
            os.dup2(copy.stdin.fileno(), stream)
        copy.stdin.close()
        copies.append(copy)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    _screens.update(screens)
    _copies.extend(copies)
    atexit.register(finish)


def finish() -> None:
    """At exit: what rank 0 printed is copied before it ends, because SLURM kills what a task leaves behind."""
    _flush()
    for stream, screen in _screens.items():
        os.dup2(screen, stream)
        os.close(screen)
    for copy in _copies:
        with suppress(subprocess.TimeoutExpired):  # a child that lives on holds the stream open
            copy.wait(COPIED_WITHIN_S)
    _screens.clear()
    _copies.clear()


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
