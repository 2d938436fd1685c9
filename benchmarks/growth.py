"""How the cost of a step grows: with tokens, packs, LoRA rank, rows and ranks; and what ranks send each other.

    python -m benchmarks.growth [--only tokens packs rank rows start ranks scaling traffic] [--rounds 3]
                                [--json FILE]

Every point is a run of some steps in processes of its own, bound to a core each. A line of figures a part, and the
exponent of cost ~ size^exponent, fitted by least squares to the logarithms: 1 is linear.

    tokens    step time, one pack of 1k to 8k tokens in rows of 256; full fine-tuning, bf16
    packs     step time, 1 to 8 packs of 1,024 accumulated
    rank      step time, LoRA of rank 8 to 128
    rows      what the loop waits for its data a step, of 1k to 1M rows; and from nothing to the order of an epoch
    start     from the command to the first step, on prepared data, of 1k to 16k rows: its imports, and what comes
              after them; the first step itself; `sft-dist --help`
    ranks     bytes of parameters and optimizer that a rank holds, of 1, 2 and 4 ranks, and what ``describe`` says
    scaling   tokens a second of 2 processes / of 1, 4 packs a step and process, each bound to its core; and of two runs
              of one process that know nothing of each other: what the machine gives. `fsdp2 once` reduces gradients
              once a step (sharding.reduce_once_a_step)
    traffic   bytes of a step's collectives, heard on 2 ranks, and what ``describe`` says
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.train_parts.environments import ROOT
from benchmarks.train_parts.machine import cpu_name, own_versions
from benchmarks.train_parts.point import Point, Report, measure
from benchmarks.train_parts.sizes import METHODS
from benchmarks.train_parts.workload import Workload

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
# FSDP2 that reduces gradients in the last micro-batch alone.
ONCE = "fsdp2 once"
SHARDINGS: dict[str, dict[str, Any]] = {ONCE: {"strategy": "fsdp2", "reduce_once_a_step": True}}

console = Console(soft_wrap=True, highlight=False)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


class Bench:
    def __init__(self, work: Workload, scratch: Path, rounds: int) -> None:
        self.work, self.scratch, self.rounds = work, scratch, rounds

    def config(self, strategy: str = "ddp", *, length: int, packs: int) -> dict[str, Any]:
        return {
            "model": {"path": str(self.work.base)},
            "method": METHODS["full"],
            "data": {"train": [{"path": "unused"}], "max_seq_len": length, "packing": "best_fit"},
            "sharding": SHARDINGS.get(strategy, {"strategy": strategy}),
            "precision": {"compute": "bf16"},
            "activation_checkpointing": {"mode": "none"},
            "train": {"global_batch_size": packs, "micro_batch_size": 1, "max_steps": 100},
            "output_dir": "unused",
        }

    def measure(self, point: Point) -> list[Report]:
        return measure(point, Path(tempfile.mkdtemp(dir=self.scratch)))

    def median_s(self, points: Sequence[Point]) -> list[float]:
        """Of each point's step, over rounds that alternate."""
        found: list[list[float]] = [[] for _ in points]
        for number in range(self.rounds):
            for index in range(len(points)) if number % 2 == 0 else range(len(points))[::-1]:
                found[index].append(self.measure(points[index])[0].seconds)
        return [statistics.median(each) for each in found]


def grows(what: str, unit: str, sizes: Sequence[int], costs: Sequence[float], digits: int = 3) -> dict[str, Any]:
    power = exponent(sizes, costs)
    figures = "  ".join(f"{size:,}: {cost:.{digits}f}" for size, cost in zip(sizes, costs, strict=True))
    console.print(f"[bold]{what}[/]  {unit}  {figures}   exponent {power:.2f}")
    return {"sizes": list(sizes), "costs": list(costs), "exponent": power}


def tokens(bench: Bench) -> dict[str, Any]:
    sizes = [1024, 2048, 4096, 8192]
    points = [Point(bench.config(length=size, packs=1), segments=size // 256, steps=5) for size in sizes]
    return grows("tokens", "s a step", sizes, bench.median_s(points))


def packs(bench: Bench) -> dict[str, Any]:
    sizes = [1, 2, 4, 8]
    points = [Point(bench.config(length=1024, packs=size), packs=size, steps=4) for size in sizes]
    return grows("packs ", "s a step", sizes, bench.median_s(points))


def rank(bench: Bench) -> dict[str, Any]:
    sizes = [8, 16, 32, 64, 128]
    points = [Point(bench.config(length=1024, packs=1) | {"method": {"type": "lora", "r": size}}) for size in sizes]
    return grows("rank  ", "s a step", sizes, bench.median_s(points))


def rows(bench: Bench) -> dict[str, Any]:
    """In this process: nothing is trained."""
    from sft_dist.data.batch import BatchPlan
    from sft_dist.data.loader import TrainingOrder, micro_batches
    from sft_dist.data.packing import Packs
    from sft_dist.data.prepared import PreparedData

    sizes, waits, orders = [1_000, 10_000, 100_000, 1_000_000], [], []
    ids, mask = np.arange(24) % 100 + 3, np.arange(24) > 8
    for size in sizes:
        data = PreparedData.of([(ids, mask)] * size, Packs(np.arange(size), np.append(np.arange(0, size, 40), size)))
        started = time.perf_counter()
        order = TrainingOrder(data, BatchPlan(4, 1, 1, 1024), 0)
        order.step(0)
        orders.append(time.perf_counter() - started)
        taken = []
        for number in range(1, 6):
            started = time.perf_counter()
            for _batch, _is_last in micro_batches(data, order.batch, order.step(number).sequences, 0, 1):
                pass
            taken.append(time.perf_counter() - started)
        waits.append(statistics.median(taken))
    first = grows("rows  ", "ms a step for its data", sizes, [1e3 * each for each in waits], 2)
    second = grows("rows  ", "ms to the order of an epoch", sizes, [1e3 * each for each in orders], 2)
    return {"data_wait_ms": first, "order_ms": second}


def start(bench: Bench) -> dict[str, Any]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    lines = (bench.work.folder / "rows.jsonl").read_text().splitlines()
    sizes, imports, begins, firsts = [1_000, 4_000, 16_000], [], [], []
    for size in sizes:
        path = bench.scratch / f"rows-{size}.jsonl"
        path.write_text("\n".join((lines * 4)[:size]) + "\n")
        config = bench.work.config("full", 1024, accumulation=1, steps=2, compute="bf16", name=f"start-{size}")
        overrides = [f"data.train=[{{path: {path}}}]", "method.type=full"]
        runs = []
        for number in range(1 + bench.rounds):  # the first one prepares the data
            folder = bench.scratch / f"start-{size}-{number}"
            report = bench.scratch / "start.json"
            command = [sys.executable, "-m", "benchmarks.train_parts.own_run", str(config), str(report), "1"]
            more = [*overrides, f"output_dir={folder}"]
            subprocess.run([*command, *more], env=environment, check=True, capture_output=True)
            runs.append(json.loads(report.read_text()))
        prepared = runs[1:]
        imports += [run["imported"] - run["started"] for run in prepared]
        begins.append(statistics.median(run["begins"][0] - run["imported"] for run in prepared))
        firsts.append(statistics.median(run["ends"][0] - run["begins"][0] for run in prepared))
    imports_s, first_s = statistics.median(imports), statistics.median(firsts)
    result = grows("start ", "s from its imports to the first step", sizes, begins, 1)
    console.print(f"        the imports take {imports_s:.1f} s before that, the first step itself {first_s:.1f} s")
    helps = []
    for _ in range(1 + bench.rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "sft_dist", "--help"], env=environment, check=True, capture_output=True)
        helps.append(time.perf_counter() - began)
    help_s = statistics.median(helps[1:])
    console.print(f"[bold]start [/]  sft-dist --help takes {help_s:.2f} s")
    return result | {"imports_s": imports_s, "first_step_s": first_s, "help_s": help_s}


def ranks(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in STRATEGIES:
        held = []
        for world in (1, 2, 4):
            point = Point(bench.config(strategy=strategy, length=256, packs=world), segments=1, steps=1, world=world)
            reports = bench.measure(point)
            held.append((world, [each.held_bytes for each in reports], [each.described_bytes for each in reports]))
        found[strategy] = held
        figures = "  ".join(f"{world}: {max(mine) / 2**20:,.1f} MiB" for world, mine, _ in held)
        is_so = all(mine == said for _, mine, said in held)
        console.print(f"[bold]ranks [/]  {strategy:6} {figures}   {'as described' if is_so else f'described: {held}'}")
    return found


def scaling(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in ("ddp", "fsdp2", ONCE, "zero3"):
        alone, both = (
            Point(bench.config(strategy=strategy, length=1024, packs=4 * world), packs=4 * world, steps=4, world=world)
            for world in (1, 2)
        )
        one_s, two_s = bench.median_s([alone, both])
        if not found:
            found["two runs"] = _two_runs(bench, alone, one_s)
        found[strategy] = {"one_s": one_s, "two_s": two_s, "speedup": 2 * one_s / two_s}
        speedup = found[strategy]["speedup"]
        console.print(
            f"[bold]scaling[/] {strategy:10} 1: {one_s:.2f} s  2: {two_s:.2f} s a step of 4 packs each  {speedup:.2f} x"
        )
    return found


def _two_runs(bench: Bench, alone: Point, one_s: float) -> float:
    """How much faster two runs of one process are than one, side by side."""
    with ThreadPoolExecutor() as pool:
        points = [replace(alone, first_core=core) for core in (0, 1)]
        seconds = [reports[0].seconds for reports in pool.map(bench.measure, points)]
    speedup = 2 * one_s / statistics.fmean(seconds)
    console.print(f"[bold]scaling[/] two runs that know nothing of each other   {speedup:.2f} x")
    return speedup


def traffic(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for strategy in (*STRATEGIES, ONCE):
        point = Point(
            bench.config(strategy=strategy, length=256, packs=4), segments=1, packs=4, steps=1, world=2, listen=True
        )
        report = bench.measure(point)[0]
        found[strategy] = {"heard": report.heard, "described": report.described}
        figures = "  ".join(f"{kind} {size / 2**20:,.1f} MiB" for kind, size in sorted(report.heard.items()))
        is_so = report.heard == report.described
        console.print(
            f"[bold]traffic[/] {strategy:10} {figures}  {'as described' if is_so else f'described: {report.described}'}"
        )
    return found


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "tokens": tokens, "packs": packs, "rank": rank, "rows": rows, "start": start, "ranks": ranks, "scaling": scaling,
    "traffic": traffic,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / ".build" / "bench-train-33m")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Workload(given.folder), Path(scratch), given.rounds)
        found = {part: PARTS[part](bench) for part in given.only}
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        on = {"machine": {"cpu": cpu_name(), "python": platform.python_version()}, "versions": own_versions()}
        given.json.write_text(json.dumps(on | {"rounds": given.rounds} | found, indent=2) + "\n")


if __name__ == "__main__":
    main()
