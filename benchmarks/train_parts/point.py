"""One run of a few steps on rows of fixed lengths, in processes of its own; each bound to a core where cores are given.

    python -m benchmarks.train_parts.point POINT.json REPORT.json     (one rank; torchrun's variables say which)

What a rank holds is measured on its tensors, and what it sends by listening to the collectives of a step.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Point:
    """
    Args:
        config: of a run; its data are replaced by rows of these lengths.
        segment: tokens of a row; segments: rows of a pack; packs: of a step.
        world: processes.
        pinned: bind rank r to core r, counted from ``first_core``, with one thread each.
        listen: count what travels, in a step that is not timed.
    """

    config: dict[str, Any]
    segment: int = 256
    segments: int = 4
    packs: int = 1
    steps: int = 8
    world: int = 1
    threads: int = 1
    pinned: bool = True
    first_core: int = 0
    listen: bool = False


@dataclass
class Report:
    """Of one rank. Args: heard, described: bytes of a step's collectives by kind."""

    step_s: list[float] = field(default_factory=list)
    data_wait_s: list[float] = field(default_factory=list)
    held_bytes: int = 0
    described_bytes: int = 0
    heard: dict[str, int] = field(default_factory=dict)
    described: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_s)


def measure(point: Point, folder: Path) -> list[Report]:
    """By rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "point.json").write_text(json.dumps(asdict(point)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(point.world):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(point.world), "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(point.world), "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(point.threads), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.train_parts.point"]
        arguments = [str(folder / "point.json"), str(folder / f"rank-{rank}.json")]
        log = (folder / f"rank-{rank}.log").open("w")
        processes.append(subprocess.Popen([*command, *arguments], env=environment, stdout=log, stderr=log))
    codes = [process.wait() for process in processes]
    if any(codes):
        bad = next(rank for rank, code in enumerate(codes) if code)
        raise SystemExit(f"rank {bad} ended with {codes[bad]}:\n{(folder / f'rank-{bad}.log').read_text()}")
    return [Report(**json.loads((folder / f"rank-{rank}.json").read_text())) for rank in range(point.world)]


def main(point: Point, report: Path) -> None:
    rank = int(os.environ["RANK"])
    if point.pinned:
        cores = sorted(os.sched_getaffinity(0))
        number = (rank + point.first_core) % len(cores)
        os.sched_setaffinity(0, {cores[number]} if point.threads == 1 else set(cores))
    import torch

    from sft_dist.config.schema import Config
    from sft_dist.data.loader import TrainingOrder
    from sft_dist.resolve import resolve
    from sft_dist.runtime.process_group import join, process_group
    from sft_dist.runtime.world import World
    from sft_dist.sharding import registry
    from sft_dist.sharding.verify import verify_sharding

    torch.set_num_threads(point.threads)
    world = World.from_environment()
    config = Config.model_validate(point.config)
    run = resolve(config, world.shape)
    with process_group(world, torch.device("cpu"), join(world)):
        strategy = registry.apply(run, torch.device("cpu"))
        spec = registry.describe(run, rank)
        verify_sharding(strategy, spec)
        data = rows_of(point, run.model.vocab_size)
        order = TrainingOrder(data, run.batch, run.seed)
        found = Report(described_bytes=spec.parameter_bytes + spec.optimizer_state_bytes)
        for number in range(WARM_UP_STEPS + point.steps):
            started = time.perf_counter()
            outcome = _step(strategy, order, number, rank)
            if number >= WARM_UP_STEPS:
                found.step_s.append(time.perf_counter() - started)
                found.data_wait_s.append(outcome.data_wait_s)
        parameters = sum(tensor.nbytes for _, tensor, _ in strategy.local_parameters())
        found.held_bytes = parameters + (strategy.optimizer_state_bytes() or 0)
        if point.listen:
            _listen(found, strategy, order, rank, run)
        strategy.close()
    report.write_text(json.dumps(asdict(found)))


def _step(strategy: Any, order: Any, number: int, rank: int) -> Any:
    import torch

    from sft_dist.train.step import train_step

    return train_step(
        strategy, order.data, order.batch, order.step(number), rank=rank, device=torch.device("cpu"), lr=1e-4
    )


def _listen(found: Report, strategy: Any, order: Any, rank: int, run: Any) -> None:
    from sft_dist.sharding.collectives import collectives
    from tests.helpers.listening import Listening

    with Listening() as listening:
        _step(strategy, order, WARM_UP_STEPS, rank)
    heard: Counter[str] = Counter()
    for (kind, size), times in listening.heard.items():
        heard[kind] += size * times
    described: Counter[str] = Counter()
    passes = run.batch.gradient_accumulation_steps
    for each in collectives(run):
        described[each.kind] += each.size_bytes * each.times(passes)
    found.heard, found.described = dict(heard), dict(described)


def rows_of(point: Point, vocab: int) -> Any:
    """As many packs as all steps need, of rows of one length; two thirds of each are supervised."""
    import numpy as np

    from sft_dist.data.packing import Packs
    from sft_dist.data.prepared import PreparedData

    rng = np.random.default_rng(0)
    count = point.packs * (point.steps + WARM_UP_STEPS + 1) * point.segments
    mask = np.arange(point.segment) >= point.segment // 3
    rows = [(rng.integers(3, vocab, point.segment), mask) for _ in range(count)]
    return PreparedData.of(rows, Packs(np.arange(count), np.arange(0, count + 1, point.segments)))


if __name__ == "__main__":
    main(Point(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
