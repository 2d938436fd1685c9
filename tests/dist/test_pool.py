"""The pool itself: a rank that fails ends its cell soon, and no process is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.helpers import pool
from tests.helpers.pool import WorldPool


def cell(kind: str, rank: int) -> int:
    """Does ``kind`` on ``rank`` while the others wait for it in a collective."""
    if dist.get_rank() == rank:
        if kind == "raise":
            raise ValueError("broken on purpose")
        if kind == "hang":
            time.sleep(600)
    dist.all_reduce(torch.zeros(1))
    return os.getpid()


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorldPool]:
    monkeypatch.setattr(pool, "GRACE_S", 0.5)
    two = WorldPool(2)
    yield two
    two.close()


def is_there(process: int) -> bool:
    """Whether it runs; one that has ended but that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_rank_that_fails_ends_its_cell_soon(two: WorldPool) -> None:
    """Rank 0, which is asked first, waits in a collective for the one that failed."""
    processes = two.run(cell, "nothing", 0)
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1:\nTraceback[^$]*broken on purpose"):
        two.run(cell, "raise", 1)
    assert time.monotonic() - started < 10
    assert not two.alive
    assert not any(map(is_there, processes))


def threads(groups: int) -> int:
    """Of this process, before it makes so many groups."""
    count = len(os.listdir("/proc/self/task"))
    for _ in range(groups):
        dist.all_reduce(torch.zeros(1), group=dist.new_group(backend="gloo"))
    return count


def test_a_cell_leaves_no_process_group(two: WorldPool) -> None:
    """Each has threads that wake all the time: those of many cells would leave no processor to the next one."""
    first, *later = [two.run(threads, groups) for groups in (3, 3, 0)]
    assert later == [first, first]


def on_a_mesh() -> int:
    """Size of the group of what an operation on a tensor with two dimensions of processes has made."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    made = torch.zeros_like(distribute_tensor(torch.ones(4), mesh, [Replicate(), Shard(0)]))
    return dist.get_world_size(made.device_mesh.get_group("shard"))


def test_an_operation_on_a_mesh_is_not_remembered_with_ended_groups(two: WorldPool) -> None:
    assert [two.run(on_a_mesh) for _ in range(2)] == [[1, 1], [1, 1]]


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    """Even when it is killed, and even while they wait."""
    program = (
        "import sys; from tests.dist.test_pool import *\n"
        "if __name__ == '__main__':\n"
        "    two = WorldPool(2); print(*two.run(cell, 'nothing', 0), flush=True); two.run(cell, 'hang', 0)\n"
    )
    (tmp_path / "program.py").write_text(program)
    root = Path(pool.__file__).parents[2]
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert started.stdout is not None
    processes = [int(word) for word in started.stdout.readline().split()]
    assert len(processes) == 2
    assert all(map(is_there, processes))
    time.sleep(0.2)
    started.send_signal(signal.SIGKILL)
    started.wait()
    started.stdout.close()
    deadline = time.monotonic() + 10
    while any(map(is_there, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
