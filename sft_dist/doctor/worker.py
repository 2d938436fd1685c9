"""The process of a node, or of a GPU, that imports torch and measures; started by the doctor and ended by it.

It says one JSON object a line on its standard output, with ``event`` in it, and takes one line of orders on its
standard input. What hangs or crashes in a driver, in torch or in NCCL takes this process with it and not the doctor.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PR_SET_PDEATHSIG = 1

# Products on a core: of this size, for so long, so many times. Quotas of control groups count over 0.1 s.
CORE_PRODUCT, CORE_WINDOW_S, CORE_WINDOWS = 384, 0.4, 4
GPU_PRODUCT, GPU_WINDOW_S = 8192, 0.5

PINGS, TRANSFER_BYTES, TRANSFER_S, MOST_TRANSFERS = 20, 4 * 2**20, 0.1, 64
# Each pair meets so often, some time apart; the best counts, so that a moment's load is not taken for a slow link.
MEETINGS = 2
# Of the tournament of all pairs; where there are more nodes, not every pair meets.
MOST_ROUNDS = 7
# An all-reduce on CPUs is as large as takes about so long over the slowest link; on GPUs it has that size.
REDUCE_S, REDUCE_LEAST_BYTES, REDUCE_MOST_BYTES, REDUCE_GPU_BYTES = 0.1, 2**18, 2**25, 2**28
REDUCE_REPEATS = 5


@dataclass(frozen=True)
class Orders:
    """What a worker is to do.

    Args:
        rank, size: among the workers of all nodes.
        leaders: ranks of the first worker of each node, in the order of the nodes.
        device: index of its GPU; None: it is there for the CPU.
        address, port: of the store of rank 0, which makes it and finds a free port where it is 0.
        interface: of the network, for gloo; empty: gloo's own choice.
        seconds: for which one waits for another.
    """

    rank: int
    size: int
    leaders: tuple[int, ...]
    device: int | None
    address: str
    port: int
    interface: str
    seconds: float


def main() -> None:
    _end_with_parent()
    say("ready", **_torch_facts())
    line = sys.stdin.readline()
    if not line:
        return
    given = json.loads(line)
    _measure(Orders(**(given | {"leaders": tuple(given["leaders"])})))
    say("done")


def say(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **facts}) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it has ended before it was asked for
        sys.exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the doctor is told, too


def _torch_facts() -> dict[str, Any]:
    started = time.perf_counter()
    import torch
    import torch.distributed  # what training imports, too

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": None,
        "devices": 0,
        "gpus": [],
        "driver_cuda": 0,
        "error": "",
    }
    if torch.version.cuda is not None:
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        facts["driver_cuda"] = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            facts["devices"] = torch.cuda.device_count()
        except RuntimeError as error:  # no driver, or one that does not serve: which of them, the doctor tells
            facts["error"] = str(error).splitlines()[0]
    for index in range(facts["devices"]):
        free, total = torch.cuda.mem_get_info(index)
        facts["gpus"].append({"name": torch.cuda.get_device_name(index), "total": total, "free": free})
    return facts | {"import_s": round(time.perf_counter() - started, 2)}


def _measure(orders: Orders) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    wait = timedelta(seconds=orders.seconds)
    store = dist.TCPStore(orders.address, orders.port, is_master=orders.rank == 0, timeout=wait, wait_for_workers=False)
    if orders.rank == 0:
        say("store", port=store.port)
    if orders.interface:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", orders.interface)
    backend = "gloo"
    if orders.device is not None:
        torch.cuda.set_device(orders.device)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=orders.rank, world_size=orders.size, timeout=wait)
    say("joined")
    try:
        _speeds(orders)
    finally:
        dist.destroy_process_group()


def _speeds(orders: Orders) -> None:
    import torch

    # All workers, for the barriers; those of one node have a core each.
    say("core", windows=list(_core_products()))
    if orders.device is not None:
        say("gpu", device=orders.device, flops_per_s=_gpu_product(torch.device("cuda", orders.device)))
    slowest = float("inf")
    if orders.rank in orders.leaders and len(orders.leaders) > 1:
        met = []
        for pair in _tournament(orders):
            met.append(pair)
            say("pairs", pairs=met)  # each time: over a slow link there may be no time for all of them
        slowest = min(pair["bytes_per_s"] for pair in met)
    if orders.size > 1:
        _all_reduce(orders, slowest)


def _core_products() -> Iterator[dict[str, float]]:
    """FLOP/s of one core, several times, while all nodes do the same; and the share of the core that it got."""
    import torch
    import torch.distributed as dist

    left, right = torch.rand(CORE_PRODUCT, CORE_PRODUCT), torch.rand(CORE_PRODUCT, CORE_PRODUCT)
    torch.mm(left, right)
    for _ in range(CORE_WINDOWS):
        dist.barrier()
        done, started, on_core = 0, time.perf_counter(), time.thread_time()
        while (took := time.perf_counter() - started) < CORE_WINDOW_S:
            torch.mm(left, right)
            done += 1
        yield {"flops_per_s": done * 2 * CORE_PRODUCT**3 / took, "share": (time.thread_time() - on_core) / took}


def _gpu_product(device: torch.device) -> float:
    """FLOP/s of a large product in bf16."""
    from sft_dist.plan.benchmark import best_product

    shapes = ((GPU_PRODUCT, GPU_PRODUCT, GPU_PRODUCT),)
    roughly = 2 * GPU_PRODUCT**3 / best_product(device, "bf16", shapes=shapes, repeats=2)
    return best_product(device, "bf16", shapes=shapes, repeats=max(3, min(500, int(GPU_WINDOW_S / roughly))))


def rounds(size: int, most: int = MOST_ROUNDS) -> list[dict[int, int]]:
    """Who meets whom in each round: everybody at most once; in all rounds of a tournament, everybody everybody else.

    The circle method: one stays, the others move on by one place. With more than ``most`` rounds, some are left out
    evenly.
    """
    places = [*range(size), *([-1] if size % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append({a: b for one, other in pairs if -1 not in (one, other) for a, b in ((one, other), (other, one))})
        places = [places[0], places[-1], *places[1:-1]]
    kept = min(len(found), most)
    return [found[number * len(found) // kept] for number in range(kept)]


def _tournament(orders: Orders) -> Iterator[dict[str, Any]]:
    """Latency and rate between this node and others, a pair at a time; all pairs of a round at once."""
    own = orders.leaders.index(orders.rank)
    for meets in MEETINGS * rounds(len(orders.leaders)):
        if own in meets:
            other = meets[own]
            latency, rate = _pair(orders.leaders[other], leads=own < other)
            yield {"other": other, "latency_s": latency, "bytes_per_s": rate}


def _pair(peer: int, *, leads: bool) -> tuple[float, float]:
    """Seconds of a small message, and bytes/s of large ones, there and back."""
    import torch

    small, large = torch.zeros(1, dtype=torch.float64), torch.zeros(TRANSFER_BYTES, dtype=torch.uint8)
    _there_and_back(small, peer, leads=leads)
    latency = min(_there_and_back(small, peer, leads=leads) for _ in range(PINGS)) / 2
    first = _there_and_back(large, peer, leads=leads)
    # The same number on both sides: the leader's.
    small[0] = min(MOST_TRANSFERS, int(TRANSFER_S / first))
    _one_way(small, peer, sends=leads)
    took = [first, *(_there_and_back(large, peer, leads=leads) for _ in range(int(small[0])))]
    return latency, 2 * TRANSFER_BYTES / min(took)


def _there_and_back(tensor: torch.Tensor, peer: int, *, leads: bool) -> float:
    started = time.perf_counter()
    _one_way(tensor, peer, sends=leads)
    _one_way(tensor, peer, sends=not leads)
    return time.perf_counter() - started


def _one_way(tensor: torch.Tensor, peer: int, *, sends: bool) -> None:
    import torch.distributed as dist

    if sends:
        dist.send(tensor, peer)
    else:
        dist.recv(tensor, peer)


def _all_reduce(orders: Orders, slowest_bytes_per_s: float) -> None:
    import torch
    import torch.distributed as dist

    from sft_dist.plan.benchmark import ring_rate

    if orders.device is not None:
        device, size_bytes, name = torch.device("cuda", orders.device), REDUCE_GPU_BYTES, "nccl"
    else:
        slowest = torch.tensor(slowest_bytes_per_s, dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
        fits = int(min(float(slowest) * REDUCE_S, float(REDUCE_MOST_BYTES)))
        device, size_bytes, name = torch.device("cpu"), max(REDUCE_LEAST_BYTES, fits), "gloo"
    rate = ring_rate(device, "all_reduce", size_bytes=size_bytes, repeats=REDUCE_REPEATS)
    say("all_reduce", bytes_per_s=rate, backend=name)


if __name__ == "__main__":
    main()
