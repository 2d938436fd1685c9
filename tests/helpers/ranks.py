"""A training run in processes of its own, which a test may kill: forked, so that a start costs no imports."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from tests.helpers import pool


class Ranks:
    """``size`` processes that run ``sft-dist ARGUMENTS`` as one launch; all of them are gone when the context ends.

    Args:
        log: of all of them.
        environment: on top of that of the first process that a test started.
        before: called in each of them with its rank, before the command; of a module.
    """

    def __init__(
        self,
        size: int,
        arguments: list[str],
        log: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        before: Callable[[int], None] | None = None,
    ) -> None:
        self.log = log
        log.touch()  # a process may be killed before it writes anything
        server, port = pool.context(), pool.free_port()
        self.processes: list[ForkServerProcess] = [
            server.Process(
                target=_run, args=(rank, size, port, arguments, str(log), dict(environment), before), daemon=True
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Self:
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self, *numbers: int) -> None:
        """SIGKILL to those ranks, without numbers to all of them, at once; returns when they are gone."""
        chosen = [self.processes[number] for number in numbers] or self.processes
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def hold(self) -> None:
        """Lets none of them go on until ``let_go``; what they wrote so far can be looked at."""
        self._signal(signal.SIGSTOP)

    def let_go(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes if process.pid is not None]

    @property
    def are_alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def exit_codes(self, timeout_s: float) -> list[int | None]:
        """Waits for their end; None for one that has not ended in time."""
        for process in self.processes:
            process.join(timeout_s)
        return [process.exitcode for process in self.processes]


def _run(
    rank: int,
    size: int,
    port: int,
    arguments: list[str],
    log: str,
    environment: dict[str, str],
    before: Callable[[int], None] | None,
) -> None:
    # Where a test before has W&B in the process that started this one, a run would share that process's part of W&B.
    os.environ.pop("WANDB_SERVICE", None)
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # What Python buffers must reach the log before a kill.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    pool.end_with_parent()
    import torch

    from sft_dist.cli import main
    from sft_dist.runtime import rank_log

    torch.set_num_threads(1)
    if before is not None:
        before(rank)
    try:
        main(arguments)
    finally:
        rank_log.finish()  # a forked process does not do at its end what is registered for it
