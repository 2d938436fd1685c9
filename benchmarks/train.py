"""Training beside the trainers that people would use instead: speed, memory, start-up and losses, in one run.

    python -m benchmarks.train [--size 33m] [--methods full lora qlora] [--lengths 1024 4096] [--rounds 3]
                               [--peers trl llamafactory axolotl] [--here] [--no-compiled] [--compute bf16]
                               [--threads 2] [--json FILE]
    python -m benchmarks.train --size 7b                   LoRA and QLoRA of Llama 2 7B at 4,096 tokens, on a CUDA GPU

Every side trains the same weights on the same packs in the same order and precision (``train_parts/workload.py``),
one process after the other, in the order A B, B A, A B, ...: what else the machine does meets all of them. A peer runs
in an environment of its own, which is made when it is not there, or with ``--here`` in the Python that runs this, where
there is no network to make one. One that is not there is named and left out; so is a method at which one ends with an
error. This project is a side twice: as it is, and with ``train.compile``.

    tokens/s    of the steps after the first ones, data included; the median of the rounds
    ratio       ours / the side's, the median over rounds of the ratio of neighbours
    compiled    the same of ours with ``train.compile``
    memory      most that the process had resident, or that torch handed out of a GPU, and there what was planned
    first step  from the start of the process to the end of its first optimizer step
    of model's products, of square
                rate of a step's FLOPs (``sizes.flops``) as a share of two rates of products that are measured
                between the rounds (``train_parts/products.py``)
    losses      largest relative difference from ours at any step

Below the table is a step's floor: its FLOPs at the rate of square products, and the bytes of weights, gradients and
moments that it has to move (``sizes.least_bytes``) at the rate of a large copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.train_parts.environments import PEERS, ROOT
from benchmarks.train_parts.machine import cpu_name
from benchmarks.train_parts.sizes import METHODS, SIZES, Size, Step, flops, least_bytes
from benchmarks.train_parts.workload import Task, Workload

OURS, COMPILED = "sft_dist", "sft_dist, compiled"
OWN = {OURS: [], COMPILED: ["train.compile=true"]}
WARM_UP_STEPS = 4
TABLE_COLUMNS = 120


class PeerFailedError(Exception):
    """A peer's run ended with an error: at which length, and what it said."""


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    side: str
    method: str
    length: int
    round: int
    step_s: float
    tokens_per_s: float
    step_flops: float
    peak_bytes: int
    planned_bytes: int | None
    first_step_s: float
    losses: list[float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A method at a length, of one side.

    Args:
        step_s, flops_s, bytes_s: a step's time, and of its floor.
        ratio, memory_ratio: ours / the side's; 1 for ours.
        compiled_ratio: speed of ours with ``train.compile`` / the side's; None where it was not measured.
        planned_gib: of ours on a GPU.
    """

    side: str
    method: str
    length: int
    step_s: float
    flops_s: float
    bytes_s: float
    tokens_per_s: float
    ratio: float
    compiled_ratio: float | None
    peak_gib: float
    planned_gib: float | None
    memory_ratio: float
    first_step_s: float
    of_model: float
    of_square: float
    losses_differ: float


def main(arguments: list[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    size = SIZES[given.size]
    if size.needs_gpu and not torch.cuda.is_available():
        parser.error(f"--size {given.size} needs a CUDA GPU")
    work = Workload(given.folder or ROOT / ".build" / f"bench-train-{given.size}", size)
    methods, lengths = given.methods or size.methods, given.lengths or size.lengths
    peers = [PEERS[name] for name in given.peers]
    absent = {peer.name: why for peer in peers if (why := peer.missing_here() if given.here else peer.install())}
    pythons = {peer.name: sys.executable if given.here else str(peer.python) for peer in peers}
    own = list(OWN) if given.compiled else [OURS]
    sides = own + [name for name in given.peers if name not in absent]
    rates: list[dict[str, float]] = [_rates(given.threads, given.size)]
    runs: list[Measured] = []
    for method in methods:
        able = sides
        for length in lengths:
            for side, number in _turns(able, given.rounds):
                if side not in able:
                    continue
                try:
                    python = pythons.get(side, sys.executable)
                    run = _run(work, side, python, method, length, number, given.compute, given.threads)
                except PeerFailedError as error:
                    absent[f"{side}, {method}"] = str(error)
                    able = [each for each in able if each != side]
                    runs = [run for run in runs if (run.side, run.method) != (side, method)]
                    continue
                runs.append(run)
                told = f"{method} {length} round {number + 1} {side}: {run.tokens_per_s:,.0f} tokens/s"
                print(told, file=sys.stderr, flush=True)
            rates.append(_rates(given.threads, given.size))
    measured = {name: statistics.median(each[name] for each in rates) for name in rates[0]}
    rows = rows_of(runs, measured, size)
    # As wide as the table where no terminal says otherwise.
    show(rows, measured, absent, Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS))
    if given.json is not None:
        result = {
            "machine": {
                "cpu": cpu_name(),
                "gpu": _gpu(),
                "threads": given.threads,
                "python": platform.python_version(),
            },
            "size": given.size,
            "compute": given.compute,
            "versions": {run.side: run.versions for run in runs},
            "absent": absent,
            "rates_per_s": measured,
            "rows": [asdict(row) for row in rows],
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def _turns(sides: list[str], rounds: int) -> Iterator[tuple[str, int]]:
    """A B, B A, A B, ..., each with its round."""
    for number in range(rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            yield side, number


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="33m")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--here", action="store_true", help="peers run in the Python that runs this")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="ours compiled too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compute", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--folder", type=Path, help="where model, data and runs are kept")
    parser.add_argument("--json", type=Path)
    return parser


def _run(
    work: Workload, side: str, python: str, method: str, length: int, number: int, compute: str, threads: int
) -> Measured:
    steps = work.size.steps.get(length, 10)
    config = work.config(method, length, accumulation=1, steps=steps, compute=compute, name=f"{method}-{length}")
    packs, content = work.packs(config)
    report, scratch = work.folder / "report.json", work.folder / "scratch"
    for old in (scratch, work.folder / "runs" / config.stem):
        shutil.rmtree(old, ignore_errors=True)
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if side in OWN:
        module = "benchmarks.train_parts.own_run"
        command = [python, "-m", module, str(config), str(report), str(threads), *OWN[side]]
        environment["PYTHONPATH"] = str(ROOT)
    else:
        task = Task(
            method, compute, length, 1, steps, threads, str(work.base), None if method == "full" else str(work.adapter),
            str(packs), str(scratch), str(report),
        )  # fmt: skip
        (work.folder / "task.json").write_text(task.to_json())
        command = [python, str(PEERS[side].script), str(work.folder / "task.json")]
        if python != sys.executable:
            environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, env=environment, cwd=work.folder, capture_output=True, text=True)
    if done.returncode or not report.exists():
        if side == OURS:
            raise SystemExit(f"{side} {method} {length} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        named = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]
        raise PeerFailedError(f"at {length:,} it ended with {done.returncode}: {(named or said)[-1]}")
    return measured_of(
        json.loads(report.read_text()), content, work.size, side=side, method=method, length=length, number=number
    )


def measured_of(
    report: dict[str, Any], content: list[Step], size: Size, *, side: str, method: str, length: int, number: int
) -> Measured:
    ends, steady = report["ends"], content[WARM_UP_STEPS:]
    assert len(ends) == len(content), (side, len(ends), len(content))
    seconds = ends[-1] - ends[WARM_UP_STEPS - 1]
    return Measured(
        side, method, length, number,
        step_s=seconds / len(steady),
        tokens_per_s=sum(step.tokens for step in steady) / seconds,
        step_flops=sum(flops(size, step, method) for step in steady) / len(steady),
        peak_bytes=report["peak_bytes"],
        planned_bytes=report.get("planned_bytes"),
        first_step_s=ends[0] - report["started"],
        losses=report["losses"],
        versions=report["versions"],
    )  # fmt: skip


def rows_of(runs: list[Measured], rates: dict[str, float], size: Size) -> list[Row]:
    cells: dict[tuple[str, int, str], list[Measured]] = {}
    for run in runs:
        cells.setdefault((run.method, run.length, run.side), []).append(run)
    rows = []
    for (method, length, side), mine in cells.items():
        ours = {run.round: run for run in cells[method, length, OURS]}
        compiled = {run.round: run for run in cells.get((method, length, COMPILED), [])}
        rate = statistics.median(run.step_flops / run.step_s for run in mine)
        planned = mine[0].planned_bytes
        rows.append(
            Row(
                side,
                method,
                length,
                step_s=statistics.median(run.step_s for run in mine),
                flops_s=mine[0].step_flops / rates["square"],
                bytes_s=least_bytes(size, method) / rates["memory"],
                tokens_per_s=statistics.median(run.tokens_per_s for run in mine),
                ratio=_faster(ours, mine),
                compiled_ratio=_faster(compiled, mine) if compiled else None,
                peak_gib=max(run.peak_bytes for run in mine) / 2**30,
                planned_gib=None if planned is None else planned / 2**30,
                memory_ratio=statistics.median(ours[run.round].peak_bytes / run.peak_bytes for run in mine),
                first_step_s=statistics.median(run.first_step_s for run in mine),
                of_model=rate / rates["model"],
                of_square=rate / rates["square"],
                losses_differ=max(
                    abs(a - b) / abs(a) for run in mine for a, b in zip(ours[run.round].losses, run.losses, strict=True)
                ),
            )
        )
    return rows


def _faster(ours: dict[int, Measured], theirs: list[Measured]) -> float:
    return statistics.median(ours[run.round].tokens_per_s / run.tokens_per_s for run in theirs)


def show(rows: list[Row], rates: dict[str, float], absent: dict[str, str], console: Console) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for column in ("method", "packed", "side"):
        table.add_column(column)
    numbers = ("tokens/s", "ratio", "compiled", "memory", "ratio", "first step", "of model's\nproducts", "of square")
    for column in (*numbers, "losses"):
        table.add_column(column, justify="right")
    last = None
    for row in rows:
        table.add_row(
            "" if (row.method, row.length) == last else row.method,
            "" if (row.method, row.length) == last else f"{row.length:,}",
            row.side, f"{row.tokens_per_s:,.0f}", "" if row.side == OURS else f"{row.ratio:.2f} x",
            "" if row.compiled_ratio is None or row.side in OWN else f"{row.compiled_ratio:.2f} x",
            f"{row.peak_gib:.2f} GiB", "" if row.side == OURS else f"{row.memory_ratio:.2f}",
            f"{row.first_step_s:.1f} s", f"{row.of_model:.0%}", f"{row.of_square:.0%}",
            "" if row.side == OURS else f"{row.losses_differ:.1e}",
        )  # fmt: skip
        last = (row.method, row.length)
    console.print(table)
    for row in rows:
        if row.side == OURS:
            console.print(_floor(row))
    console.print(
        f"products: model {rates['model'] / 1e9:,.0f}, square {rates['square'] / 1e9:,.0f} GFLOP/s; "
        f"memory, read and written: {rates['memory'] / 1e9:,.1f} GB/s"
    )
    for name, why in absent.items():
        console.print(f"{name} is left out: {why}")


def _floor(row: Row) -> str:
    step, products, memory = (f"{seconds * 1e3:,.0f} ms" for seconds in (row.step_s, row.flops_s, row.bytes_s))
    text = f"{row.method} {row.length:,}: a step takes {step}; its FLOPs {products}, its weights and moments {memory}"
    if row.planned_gib is None:
        return text
    return f"{text}; planned {row.planned_gib:.2f} GiB, measured / planned {row.peak_gib / row.planned_gib:.3f}"


def _rates(threads: int, size: str) -> dict[str, float]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.train_parts.products", str(threads), size]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
