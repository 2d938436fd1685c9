"""``sft-dist logs``: what the processes of a run print, from its folder, also while they run elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sft_dist.cluster.attempts import FOLDER as SLURM
from sft_dist.cluster.status import require_run
from sft_dist.errors import ConfigError

# In the run directory: a folder for each start, with a file for each rank.
LOGS = "logs"
_RANK = re.compile(r"rank-(\d+)\.log")

POLL_S = 0.5
BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Choice:
    """What is to be shown.

    Args:
        rank: None: all of them, each line with its rank.
        attempt: a start, as its folder below logs/ is called; None: the newest one.
        of_job: the output of the SLURM job in place of that of a rank.
        lines: that are shown of what is there already, of each file.
        follow: go on with what is added, and with the starts that follow.
    """

    rank: int | None = 0
    attempt: str | None = None
    of_job: bool = False
    lines: int = 100
    follow: bool = False


def show_logs(
    folder: Path,
    choice: Choice,
    *,
    out: BinaryIO | None = None,
    say: Callable[[str], None] | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Writes what is chosen, byte by byte as it was printed.

    Args:
        out: by default stdout.
        say: gets which file follows, where that is not clear; by default on stderr.
        goes_on: asked between two looks whether to follow further.

    Raises:
        ConfigError: the folder holds no run, or not what is chosen; a file that may still come is waited for.
    """
    require_run(folder)
    out, say = out or sys.stdout.buffer, say or _say
    if not choice.follow:
        for tail in _open(_require(folder, choice), choice, lines=choice.lines):
            out.write(tail.read())
            out.write(tail.rest())
        out.flush()
        return
    _follow(folder, choice, out, say, goes_on)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen_files(folder: Path, choice: Choice) -> dict[Path, int | None]:
    """Files and the rank of each, as they are there now; those of a job have none.

    Raises:
        ConfigError: the start or the rank that was named is not there, though others are.
    """
    if choice.of_job:
        outputs = sorted((folder / SLURM).glob("train-*.out"), key=_dated)
        return dict.fromkeys(outputs[-1:])
    attempts = attempts_of(folder)
    if choice.attempt is not None and choice.attempt not in [each.name for each in attempts]:
        if attempts:
            raise ConfigError(
                f"{folder / LOGS} has no start {choice.attempt}",
                fix=f"give one of {', '.join(each.name for each in attempts)}",
            )
        return {}
    # Without SLURM each node has a folder of its own until its ranks have met rank 0.
    met = [each for each in attempts if 0 in rank_files(each)] or attempts
    attempt = met[-1] if choice.attempt is None and met else folder / LOGS / (choice.attempt or "")
    files = rank_files(attempt)
    if choice.rank is None:
        return {path: rank for rank, path in files.items()}
    if files and choice.rank not in files and not choice.follow:
        raise ConfigError(f"{attempt} has no log of rank {choice.rank}", fix=f"give one of 0 to {max(files)}, or all")
    return {files[choice.rank]: choice.rank} if choice.rank in files else {}


def attempts_of(folder: Path) -> list[Path]:
    """Folders of the starts, the newest last: an old one gets no file and no line any more."""
    parent = folder / LOGS
    return sorted((each for each in parent.iterdir() if each.is_dir()), key=_newest) if parent.is_dir() else []


def rank_files(attempt: Path) -> dict[int, Path]:
    """By rank."""
    if not attempt.is_dir():
        return {}
    found = {int(match[1]): path for path in attempt.iterdir() if (match := _RANK.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _newest(attempt: Path) -> tuple[float, str]:
    return max(
        [attempt.stat().st_mtime, *(path.stat().st_mtime for path in rank_files(attempt).values())]
    ), attempt.name


def _dated(path: Path) -> float:
    return path.stat().st_mtime


def _require(folder: Path, choice: Choice) -> dict[Path, int | None]:
    files = chosen_files(folder, choice)
    if files:
        return files
    if choice.of_job:
        raise ConfigError(
            f"{folder / SLURM} has no output of a job: none has started yet, or none was submitted",
            fix="`status RUN_DIR` says how the job stands; --follow waits for it",
        )
    raise ConfigError(
        f"{folder / LOGS} has no logs: nothing has started yet, or no script of launch/ has started it",
        fix="--follow waits for the first; --job shows what the SLURM job printed",
    )


class Tail:
    """A file that grows, from its last lines on.

    Args:
        prefix: of each line; then only whole lines are read.
        lines: of what is there already; None: all.
    """

    def __init__(self, path: Path, *, prefix: bytes = b"", lines: int | None = None) -> None:
        self.path, self.prefix = path, prefix
        self._part = b""
        with path.open("rb") as file:
            self._at = 0 if lines is None else start_of_last_lines(file, lines)

    def read(self) -> bytes:
        """What has come since. A file that became shorter was written anew, and is read from its start."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._at:
                    self._at = 0
                file.seek(self._at)
                new = file.read()
        except FileNotFoundError:
            return b""
        self._at += len(new)
        if not self.prefix:
            return new
        *whole, self._part = (self._part + new).split(b"\n")
        return b"".join(self.prefix + line + b"\n" for line in whole)

    def rest(self) -> bytes:
        """A last line without its end."""
        part, self._part = self._part, b""
        return self.prefix + part + b"\n" if part else b""


def start_of_last_lines(file: BinaryIO, lines: int) -> int:
    """Where the last lines of a file begin; a last one without its end counts as a line."""
    end = at = file.seek(0, 2)
    if lines == 0:
        return end
    wanted = lines
    while at > 0:
        first = max(0, at - BLOCK_BYTES)
        file.seek(first)
        block = file.read(at - first)
        if at == end and not block.endswith(b"\n"):
            wanted -= 1
        # The line before the wanted ones ends here.
        if block.count(b"\n") > wanted:
            for _ in range(wanted + 1):
                block = block[: block.rindex(b"\n")]
            return first + len(block) + 1
        wanted -= block.count(b"\n")
        at = first
    return 0


def _open(files: dict[Path, int | None], choice: Choice, *, lines: int | None) -> list[Tail]:
    """
    Args:
        lines: of what is there already, of each; None: all.
    """
    width = len(str(max((rank for rank in files.values() if rank is not None), default=0)))
    with_rank = choice.rank is None and not choice.of_job
    prefixes = [f"[{rank:>{width}}] ".encode() if with_rank else b"" for rank in files.values()]
    return [Tail(path, prefix=prefix, lines=lines) for path, prefix in zip(files, prefixes, strict=True)]


def _follow(
    folder: Path, choice: Choice, out: BinaryIO, say: Callable[[str], None], goes_on: Callable[[], bool]
) -> None:
    tails: dict[Path, Tail] = {}
    is_first = True
    while True:
        files = chosen_files(folder, choice)
        if not files and is_first:
            say(f"nothing is in {folder / (SLURM if choice.of_job else LOGS)} yet: waiting")
        new = {path: rank for path, rank in files.items() if path not in tails}
        gone = [tail for path, tail in tails.items() if path not in files]
        _write(out, gone)
        for tail in gone:  # of a start before; its last line may lack its end
            out.write(tail.rest())
            del tails[tail.path]
        if new and (gone or not is_first or choice.rank is None):
            say(f"==> {next(iter(new)).parent if choice.rank is None else next(iter(new))} <==")
        # What has begun since this look began is shown from its start.
        with suppress(FileNotFoundError):  # moved meanwhile; the next look finds it
            for tail in _open(new, choice, lines=choice.lines if is_first else None):
                tails[tail.path] = tail
        is_first = False
        _write(out, tails.values())
        out.flush()
        if not goes_on():
            return
        time.sleep(POLL_S)


def _write(out: BinaryIO, tails: Iterable[Tail]) -> None:
    for tail in tails:
        out.write(tail.read())
