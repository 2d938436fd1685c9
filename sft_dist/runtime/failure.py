"""How a failure reaches the user: two lines on stderr and an exit code, once for a launch, not for each process."""

from __future__ import annotations

import os
import sys
import time
import traceback

from rich.console import Console
from rich.text import Text

from sft_dist.errors import ConfigError, DataError, SftError

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT, what shells report for Ctrl-C

# Longer than a launcher needs to see that a process has failed and to end the others: torchrun looks every 0.1 s,
# deepspeed every second.
SIBLING_GRACE_S = 3.0


def report(error: SftError, *, debug: bool) -> None:
    """Prints what went wrong and how to fix it, with the stack trace before it if ``debug``.

    Every process of a launch meets the same mistake in a config or in data, so the first of each node speaks for all.
    The others wait: where the first has failed too, the launcher ends them before they speak; where it has not (one
    process alone has no GPU, say), they do speak. Other errors differ between processes, and each is printed.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, ConfigError | DataError) and os.environ.get("LOCAL_RANK", rank) != "0":
        time.sleep(SIBLING_GRACE_S)
    prefix = f"[rank {rank}] " if rank != "0" else ""
    if debug:
        _write("".join(traceback.format_exception(error)), prefix=prefix)
    first, *rest = error.what.splitlines() or [""]
    lines = [Text.assemble(("error: ", "bold red"), first)]
    lines += [Text(" " * len("error: ") + line) for line in rest]
    lines.append(Text.assemble(("  fix: ", "bold green"), error.fix))
    # soft_wrap: a terminal may wrap a line, but a log file and `grep` see it whole.
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("\n").join(Text.assemble(prefix, line) for line in lines))


def report_unexpected(error: BaseException) -> None:
    """Prints the stack trace of a defect; under a launcher each line says which process it came from."""
    rank = os.environ.get("RANK")
    _write("".join(traceback.format_exception(error)), prefix=f"[rank {rank}] " if rank is not None else "")


def _write(text: str, *, prefix: str) -> None:
    # One write for the whole trace, so that those of several processes do not interleave line by line.
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in text.splitlines()))
    sys.stderr.flush()
