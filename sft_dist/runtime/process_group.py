"""The process group of a run: NCCL on GPUs, gloo on CPUs, a group of one without a launcher."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from sft_dist.errors import ConfigError, SftError
from sft_dist.runtime import progress
from sft_dist.runtime.meeting import LAUNCHER, no_answer, not_all_came, patience_s
from sft_dist.runtime.world import World, attempt_name

T = TypeVar("T")

# Preparing data may take longer than any collective of training may: ranks wait for it on the store.
PREPARE_TIMEOUT = timedelta(hours=24)
HEARD_TIMEOUT = timedelta(seconds=10)


def device_of(world: World) -> torch.device:
    """The accelerator of this rank, or the CPU.

    Raises:
        ConfigError: more processes on this node than GPUs.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {world.local_rank} has no GPU: this node has {torch.cuda.device_count()}",
            fix=f"start at most {torch.cuda.device_count()} processes on a node",
        )
    return torch.device("cuda", world.local_rank)


def join(world: World) -> dist.Store:
    """Meets the other processes: a key-value store that all share, and no process group yet."""
    store: dist.Store
    if "RANK" in os.environ:
        store = _met(world)
        # Under torchrun the store lives in the launcher, and still has what an earlier attempt wrote.
        return dist.PrefixStore(f"attempt-{attempt_name()}", store)
    return dist.HashStore()


def _met(world: World) -> dist.Store:
    """The store of the launcher, or one that rank 0 keeps.

    Raises:
        MachineError: the scripts of launch/ let these processes meet by themselves, at one time, and they did not.
    """
    store: dist.Store
    if LAUNCHER not in os.environ:
        store, _, _ = next(dist.rendezvous("env://", rank=world.rank, world_size=world.size))
        return store
    # As long again as this process took to get here: the others have the same to read, from the same disk.
    within_s = patience_s() + (time.time() - psutil.Process().create_time())
    limit = timedelta(seconds=within_s)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=world.rank, world_size=world.size, timeout=limit))
    except dist.DistError as error:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if world.is_main:
            raise not_all_came(os.environ[LAUNCHER], num_nodes=str(world.shape.num_nodes)).everywhere() from error
        raise no_answer(os.environ[LAUNCHER], host, port, within_s=within_s).everywhere() from error
    store.set_timeout(default_pg_timeout)  # the limit was for this meeting
    return store


@contextmanager
def process_group(world: World, device: torch.device, store: dist.Store) -> Iterator[None]:
    """Makes the process group of those who share ``store``, and leaves it again.

    A world of one gets a group too, so that every strategy runs the same code on one process as on many.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=world.rank, world_size=world.size)
    # DeepSpeed reads this even when the group already stands; left behind, it would make accelerate wait for others.
    is_alone = "LOCAL_RANK" not in os.environ
    if is_alone:
        os.environ["LOCAL_RANK"] = "0"
    try:
        yield
    finally:
        dist.destroy_process_group()
        if is_alone:
            os.environ.pop("LOCAL_RANK", None)


def run_on_main_first(world: World, store: dist.Store, key: str, work: Callable[[], str | None]) -> str | None:
    """Runs ``work`` on rank 0 while the others wait on the store; all get its answer, or raise its ``SftError``.

    Args:
        key: a name that no other call of this run uses.
    """
    if world.is_main:
        try:
            result = work()
        except SftError as e:
            store.set(key, json.dumps([type(e).__name__, e.what, e.fix]))
            _wait_until_heard(world, store, key)
            raise e.everywhere() from None
        except BaseException as e:
            # No wait here: this may be the user's Ctrl-C, which has ended the others too.
            store.set(key, json.dumps(["SftError", f"rank 0 failed: {e!r}", "see its trace"]))
            raise
        store.set(key, json.dumps([result]))
        return result
    with progress.doing("rank 0"):
        store.wait([key], PREPARE_TIMEOUT)
    answer = json.loads(store.get(key))
    if len(answer) == 1:
        return None if answer[0] is None else str(answer[0])
    store.set(f"{key}/heard by {world.rank}", "")
    kind, what, fix = answer
    raise _error_class(kind)(what, fix=fix).everywhere()


def _wait_until_heard(world: World, store: dist.Store, key: str) -> None:
    """Keeps rank 0 alive until the others know: outside torchrun the store lives in it and would die with it."""
    with suppress(dist.DistError):
        store.wait([f"{key}/heard by {rank}" for rank in range(1, world.size)], HEARD_TIMEOUT)


def _error_class(name: str) -> type[SftError]:
    return next((c for c in SftError.__subclasses__() if c.__name__ == name), SftError)


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of a group, by default of all; every one of them calls it."""
    values: list[T] = [value] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_main(value: T, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value, on every rank; every one of them calls it."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]
