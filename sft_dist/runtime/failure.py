"""How a failure reaches the user: two lines on stderr and an exit code, once for a launch, not for each process."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from sft_dist.errors import Preempted, SftError
from sft_dist.runtime.rank_log import other_screen

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, what shells report for Ctrl-C

# Names a folder that the processes of a launch on a node share, where the launcher does not give them one itself.
LAUNCH_FOLDER = "SFT_DIST_LAUNCH_FOLDER"

# In that folder: what a process that reported a failure notes of its exit code, and what has been said for all.
NOTE, SAID = "failed-", "said-"

# Longer than a launcher needs to see that a process has failed and to end the others; deepspeed looks every second.
SIBLING_GRACE_S = 3.0


def with_config(fix: str, words: Sequence[str]) -> str:
    """A fix whose ``CONFIG`` is the file of a command line and its overrides; of a model's those of the model alone.

    Args:
        words: of the command line; without a YAML file among them the fix stays as it is.
    """
    place = next((n for n, word in enumerate(words) if word.endswith((".yaml", ".yml")) and word[0] != "-"), None)
    if place is None:
        return fix
    only = "model." if "model fetch CONFIG" in fix else ""
    overrides = (word for word in words[place + 1 :] if "=" in word and word[0] != "-" and word.startswith(only))
    given = shlex.join([words[place], *overrides])
    return re.sub(r"\bCONFIG\b", lambda _: given, fix)


def report(error: SftError, *, debug: bool, words: Sequence[str] = ()) -> None:
    """Prints what went wrong and how to fix it, with the stack trace before it if ``debug``.

    Args:
        words: of the command line, for fixes that name a configuration.

    What all processes of a launch meet, such as a mistake in the configuration, is printed once on each node. Other
    errors differ between processes: each is printed, with the rank that met it.
    """
    rank = os.environ.get("RANK", "0")
    note(error.exit_code)
    if isinstance(error, Preempted):
        if rank == "0":
            _write(f"{error.what}; {error.fix}", prefix="")
        return
    shared = error.on_all_ranks
    if shared and "RANK" in os.environ and not _is_first_to_say(str(error)):
        return
    # Here: importing it is a quarter of the time of a command that has no failure to print, such as --help.
    from rich.console import Console
    from rich.text import Text

    prefix = f"[rank {rank}] " if rank != "0" and not shared else ""
    if debug:
        _write("".join(traceback.format_exception(error)), prefix=prefix)
    first, *rest = error.what.splitlines() or [""]
    lines = [Text.assemble(("error: ", "bold red"), first)]
    lines += [Text(" " * len("error: ") + line) for line in rest]
    lines.append(Text.assemble(("  fix: ", "bold green"), with_config(error.fix, words)))
    for stream in _screens():
        # soft_wrap: a terminal may wrap a line, but a log file and `grep` see it whole.
        console = Console(file=stream, soft_wrap=True, highlight=False)
        console.print(Text("\n").join(Text.assemble(prefix, line) for line in lines))


def note(code: int) -> None:
    """For the launcher, where its own processes share a folder: the exit code with which this process ends."""
    if "RANK" in os.environ and LAUNCH_FOLDER in os.environ:
        file = Path(os.environ[LAUNCH_FOLDER]) / f"{NOTE}{os.environ['RANK']}"
        file.write_text(str(code), encoding="utf-8")


def _is_first_to_say(message: str) -> bool:
    """Whether no other process of this launch on this node has said ``message``."""
    folder = _folder_of_this_launch()
    if folder is not None:
        said = folder / f"{SAID}{hashlib.sha256(message.encode()).hexdigest()}"
        try:
            said.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
    # Nothing is shared under other launchers. The node's first process speaks; the others wait: if the first has failed
    # too, the launcher ends them meanwhile, and if it has not (one process alone has no GPU, say), they do speak.
    if os.environ.get("LOCAL_RANK", os.environ["RANK"]) != "0":
        time.sleep(SIBLING_GRACE_S)
    return True


def _folder_of_this_launch() -> Path | None:
    if LAUNCH_FOLDER in os.environ:
        return Path(os.environ[LAUNCH_FOLDER])
    # torchrun and accelerate give each process <folder of this launch>/<local rank>/error.json.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[1] if error_file is not None else None


def noted_exit_codes(folder: Path) -> dict[int, int]:
    """Exit codes by rank of the processes that reported a failure, in a launch that shares ``folder``."""
    return {int(file.name.rpartition("-")[2]): int(file.read_text()) for file in folder.glob(f"{NOTE}*")}


def forget(folder: Path) -> None:
    """Empties what the processes of an earlier attempt of the same launch left in ``folder``."""
    for prefix in (NOTE, SAID):
        for file in folder.glob(f"{prefix}*"):
            file.unlink()


def report_interrupt() -> None:
    """One line for a launch that the user ended."""
    if os.environ.get("RANK", "0") == "0":
        _write("interrupted: what was saved stays; --resume auto goes on from the last checkpoint", prefix="\n")


def report_unexpected(error: BaseException) -> None:
    """Prints the stack trace of a defect; under a launcher each line says which process it came from."""
    rank = os.environ.get("RANK")
    _write("".join(traceback.format_exception(error)), prefix=f"[rank {rank}] " if rank is not None else "")


def _write(text: str, *, prefix: str) -> None:
    # One write for the whole trace, so that those of several processes do not interleave line by line.
    for stream in _screens():
        stream.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
        stream.flush()


def _screens() -> list[TextIO]:
    """Stderr, and where that is kept in a rank's own log, the screen."""
    other = other_screen()
    return [sys.stderr] if other is None else [sys.stderr, other]
