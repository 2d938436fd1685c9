"""Warm worlds: real gloo processes that are started once per size and run many test cells.

A launch costs seconds (imports, rendezvous); a cell in a warm world a second or two. Workers are forked from a server
that has imported everything and done nothing else, so that the imports are paid once and no thread pool or lock of the
test process is copied into them.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing as mp
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

from tests.helpers import figures

CELL_TIMEOUT_S = 180

# What a rank may take after another one has failed, before it counts as waiting for that one in a collective.
GRACE_S = 5


def context() -> ForkServerContext:
    """Starts processes that have torch, transformers and DeepSpeed imported already."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    return context


class WorldPool:
    """``size`` processes in one group; ``run`` calls a module-level function on all of them at once."""

    def __init__(self, size: int) -> None:
        self.size = size
        server = context()
        port = free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = server.Pipe()
            process = server.Process(target=_worker, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Results by rank.

        Raises:
            AssertionError: a rank raised (with its trace) or did not answer in time; the world is then ended.
        """
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        answers: dict[int, tuple[Any, str | None]] = {}
        deadline = time.monotonic() + CELL_TIMEOUT_S
        while len(answers) < self.size:
            waiting = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                answer = _receive(pipe)
                answers[waiting[pipe]] = answer
                if answer[1]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        silent = [rank for rank in range(self.size) if rank not in answers]
        failures = [f"rank {rank}:\n{answers[rank][1]}" for rank in sorted(answers) if answers[rank][1]]
        if silent and not failures:
            failures = [f"ranks {silent} of {self.size} did not answer within {CELL_TIMEOUT_S} s"]
        if failures:
            # Peers of a failed rank may be out of step in their collectives.
            self.close()
            raise AssertionError("\n".join(failures))
        figures.cell_seconds.append((time.perf_counter() - started, f"{function.__module__}.{function.__qualname__}"))
        return [answers[rank][0] for rank in range(self.size)]

    @property
    def alive(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _receive(pipe: Any) -> tuple[Any, str | None]:
    """(result, None) or (None, what went wrong)."""
    try:
        answer: tuple[Any, str | None] = pipe.recv()
        return answer
    except (EOFError, OSError):
        return None, "the process ended without an answer"


def _worker(rank: int, size: int, port: int, pipe: Connection) -> None:
    # Ctrl-C is for the test process, which ends this one; so does its death, even while this one waits for a peer.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    # What is imported stays: collections of garbage need not look at it.
    gc.collect()
    gc.freeze()
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (getattr(importlib.import_module(module), name)(*args), None)
        except BaseException:
            answer = (None, traceback.format_exc())
        end_groups()
        pipe.send(answer)


def end_groups() -> None:
    """Ends the process groups that a cell has made; DeepSpeed's own, which it keeps for the next engine, stay.

    Each has three threads, one of which wakes a hundred times a second: after some hundred cells they would take half of
    the machine.
    """
    import torch.distributed as dist
    import torch.distributed.distributed_c10d as c10d
    from deepspeed.utils import groups
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    # What DTensor remembers of an operation has the mesh of its first result, and would give it to the next, equal mesh.
    _clear_sharding_prop_cache()
    gc.collect()  # strategies are cycles, and hold theirs
    kept = {id(value) for value in vars(groups).values()} | {id(c10d.GroupMember.WORLD)}
    for group in [g for g in c10d._world.pg_map if id(g) not in kept]:
        dist.destroy_process_group(group)


def end_with_parent() -> None:
    """Lets this process end when the test process does, whatever it is waiting for."""

    def wait_for_it() -> None:
        parent = mp.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
