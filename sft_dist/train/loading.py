"""How much of the weights has been read, while they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from sft_dist.runtime import progress as done
from sft_dist.runtime.world import World


@contextmanager
def loading(world: World, *, on_read: Callable[[int, float], None]) -> Iterator[Callable[[int], None]]:
    """Shows on rank 0 how much of the weights it has read; it reads what it keeps of them.

    Args:
        on_read: told how many bytes this rank has read in how many seconds.
    """
    started, total = time.perf_counter(), 0

    def count_in(count: int) -> None:
        nonlocal total
        total += count
        done.tick()
        on_read(total, time.perf_counter() - started)

    if not world.is_main:
        yield count_in
        return
    console = Console(highlight=False)
    columns = (
        SpinnerColumn(),
        TextColumn("reading weights {task.fields[size]}"),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("weights", total=None, size=decimal(0))

        def on_bytes(count: int) -> None:
            count_in(count)
            progress.update(task, advance=count, size=decimal(total))

        yield on_bytes
    ranks = "" if world.shape.size == 1 else ", as much as rank 0 keeps,"
    console.print(f"read {decimal(total)} of weights{ranks} in {time.perf_counter() - started:.1f} s")
