"""What a run pays in its steps for being watched and written about: everything on against a bare loop, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.everything_on [--pairs 20] [--block 20] [--strategy ddp] [--terminal]

A run of two processes on the CPU, through ``sft-dist train``, whose loop changes sides every few steps, in the order
on, off, off, on. Both sides train the same model on packs of the same length.

    on    the loop of every run: watchdog, heartbeat, the guard (``spikes.policy: roll_back``), slow ranks, agreement,
          W&B (offline), TensorBoard, ``metrics.jsonl`` and the console at every step; ``report.html`` is written
          beside it from every evaluation on
    off   ``train_step`` and nothing else: no thread, no line, no agreement

For each of wall time and CPU time one ratio, on / off, with a 95 % interval (bootstrap over pairs of blocks):

    medians     of the time of a step on rank 0
    means       of the same: what comes every few seconds counts too
    CPU         user and system seconds of all ranks and of everything they started, a step; before a block ends, all
                that was begun in it is waited for, the page too

Evaluations, with answers and scores, are on neither side; what one takes is told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil

WORLD = 2
# Steps that compile, allocate and fill caches; and of each block the first, in which threads start.
WARM_UP_STEPS, FIRST_STEPS = 10, 1
# A page that takes longer than this is a mistake.
SETTLE_S = 120.0
RESAMPLES, LOW, HIGH = 4000, 2.5, 97.5
GOAL = 1.02


@dataclass
class Side:
    """What was measured with everything on, or off.

    Args:
        step_s: of a rank, by block.
        own_cpu_s: of its process, a step, by block; started_cpu_s: of the processes that it has started.
    """

    step_s: list[list[float]] = field(default_factory=list)
    own_cpu_s: list[float] = field(default_factory=list)
    started_cpu_s: list[float] = field(default_factory=list)

    @property
    def cpu_s(self) -> list[float]:
        return [sum(each) for each in zip(self.own_cpu_s, self.started_cpu_s, strict=True)]


@dataclass
class Measured:
    """One rank's. Args: evaluation_s, evaluation_cpu_s: an evaluation each."""

    on: Side = field(default_factory=Side)
    off: Side = field(default_factory=Side)
    evaluation_s: list[float] = field(default_factory=list)
    evaluation_cpu_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """on / off, with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f}  [{self.low:.4f}, {self.high:.4f}]"


def ratio(on: Sequence[Any], off: Sequence[Any], of: Callable[[list[Any]], float], *, seed: int = 0) -> Ratio:
    """
    Args:
        on, off: blocks, those of a pair at the same place.
        of: a figure of some blocks.
    """
    rng, pairs = np.random.default_rng(seed), len(on)
    found = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(pairs, size=pairs)
        found.append(of([on[i] for i in chosen]) / of([off[i] for i in chosen]))
    low, high = np.percentile(found, [LOW, HIGH])
    return Ratio(of(list(on)) / of(list(off)), float(low), float(high))


def median_of(blocks: list[list[float]]) -> float:
    return float(np.median(np.concatenate(blocks)))


def mean_of(blocks: list[list[float]]) -> float:
    return float(np.mean(np.concatenate(blocks)))


def started_cpu_s() -> float:
    """User and system seconds of everything that this process has started, ended or not."""
    own = psutil.Process()
    started = sum(own.cpu_times()[2:4])
    for child in own.children(recursive=True):
        try:
            started += sum(child.cpu_times()[:4])
        except psutil.Error:
            continue  # it ended meanwhile, and is in its parent's figures
    return float(started)


def rank_main(folder: Path, config: Path, *, pairs: int, block: int, evaluate_every: int) -> None:
    """Of one rank: the command, with a loop that changes sides."""
    import torch
    import torch.distributed as dist

    from sft_dist.cli import main as command
    from sft_dist.config.watchdog_schema import WatchdogConfig
    from sft_dist.report.beside import Page
    from sft_dist.runtime.seeding import seed_step
    from sft_dist.sharding.optim import learning_rate
    from sft_dist.train import run
    from sft_dist.train.loop import Training
    from sft_dist.train.step import train_step
    from sft_dist.train.stragglers import Forwards
    from sft_dist.watchdog.watch import Watchdog

    torch.set_num_threads(1)
    measured, blocks = Measured(), 0

    class Alternating(Training):
        """The loop of a run, but for the order of its parts."""

        def _all_steps(self) -> None:
            if self.guard.needs_start(self.completed):
                self._save()
                self.checkpointer.wait()
            self._page = None
            if self.logger is not None:
                page = getattr(self.logger._on_news, "__self__", None)
                assert isinstance(page, Page)
                self._page = page
            for _ in range(WARM_UP_STEPS):
                self._step()
            self._quiet()
            for pair in range(pairs):
                order = (True, False) if pair % 2 == 0 else (False, True)
                for is_on in order:
                    if is_on and pair % evaluate_every == 0:
                        self._measure_evaluation()
                    self._block(is_on)
            self._loud()
            self.num_steps = self.completed

        def _block(self, is_on: bool) -> None:
            nonlocal blocks
            blocks += 1
            side, step_s = (measured.on, self._step) if is_on else (measured.off, self._bare_step)
            dist.barrier()
            # Looking for processes takes time of its own, so it comes first, and last at the end.
            started_before, own_before, taken = started_cpu_s(), time.process_time(), []
            with ExitStack() as watched:
                if is_on:
                    self._loud()
                    rules, output = WatchdogConfig(), Path(self.run.output_dir)
                    watchdog = watched.enter_context(Watchdog(rules, output, self.world, self.heartbeat))
                    store = dist.distributed_c10d._get_default_store()
                    watchdog.meet(dist.PrefixStore(f"block {blocks}", store))
                for _ in range(block):
                    started = time.perf_counter()
                    step_s()
                    taken.append(time.perf_counter() - started)
                self._read()
            if is_on:
                self._quiet()
            side.step_s.append(taken[FIRST_STEPS:])
            side.own_cpu_s.append((time.process_time() - own_before) / block)
            side.started_cpu_s.append((started_cpu_s() - started_before) / block)

        def _bare_step(self) -> None:
            number = self.completed
            seed_step(self.run.seed, number, self.world.rank)
            train_step(
                self.strategy, self.order.data, self.run.batch, self.order.step(number), rank=self.world.rank,
                device=self.device, lr=learning_rate(self.run.optim, number, self.num_steps),
            )  # fmt: skip
            self.completed += 1

        def _loud(self) -> None:
            """Begins what ``_quiet`` has ended."""
            self._forwards = Forwards(self.strategy.model, self.device)
            beating = self.heartbeat
            if beating._beat is not None:
                beating._ends.clear()
                beating._thread = Thread(target=beating._keep_beating, name="heartbeat", daemon=True)
                beating._thread.start()

        def _quiet(self) -> None:
            """Ends what a run does beside its steps, and waits for it."""
            self._forwards.close()
            beating = self.heartbeat
            if beating._beat is not None:
                beating._ends.set()
                beating._changed.set()
                beating._thread.join()
            self._settle()

        def _settle(self) -> None:
            """Waits for what was given to others: trackers, and the page."""
            self._settle_trackers()
            if self._page is not None and self._page._process is not None:
                self._await(self._page._process.pid)

        @staticmethod
        def _await(process: int) -> None:
            """Until it has ended; what it cost stays for ``Page`` to find."""
            until = time.monotonic() + SETTLE_S
            while os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                assert time.monotonic() < until, "the page is not written"
                time.sleep(0.005)

        def _settle_trackers(self) -> None:
            if self.logger is None:
                return
            until = time.monotonic() + SETTLE_S
            while any(tracker._acts.qsize() for tracker in self.logger._trackers):
                assert time.monotonic() < until, "a tracker does not take its lines"
                time.sleep(0.005)

        def _measure_evaluation(self) -> None:
            before, started = time.process_time(), time.perf_counter()
            self._evaluate()
            measured.evaluation_s.append(time.perf_counter() - started)
            self._settle_trackers()  # they are handed its tables
            measured.evaluation_cpu_s.append(time.process_time() - before)

    run.Training = Alternating  # type: ignore[misc]
    try:
        command(["train", str(config)])
    finally:
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(asdict(measured)))


def settings(folder: Path, *, strategy: str, steps: int, tokens: int) -> dict[str, Any]:
    """Of the run: rows that fill a pack each, one pack a rank and step, everything on that can be."""
    return {
        "model": {"path": str(folder / "base")},
        "method": {"type": "full"},
        "data": {
            "train": [{"path": str(folder / "rows.jsonl")}], "eval": [{"path": str(folder / "held_out.jsonl")}],
            "max_seq_len": tokens, "packing": "best_fit", "cache_dir": str(folder / "cache"),
            "over_length": "truncate",
        },
        "sharding": {"strategy": strategy},
        "precision": {"compute": "fp32"},
        "optim": {"lr": 1e-4},
        "train": {"global_batch_size": WORLD, "micro_batch_size": 1, "max_steps": steps},
        "eval": {
            "before_training": False, "samples": {"prompts": ["Where?", "When?"]}, "scores": {},
            "answers": {"max_examples": 4, "max_new_tokens": 16},
        },
        "spikes": {"policy": "roll_back"},
        "watchdog": {"enabled": False},  # one a block, see above
        "checkpoint": {"prove_final": False},
        "logging": {"wandb": {"mode": "offline"}, "tensorboard": True},
        "output_dir": str(folder / "run"),
    }  # fmt: skip


def prepare(folder: Path, *, strategy: str, steps: int, tokens: int, layers: int, hidden: int) -> Path:
    """Model, rows and configuration; the configuration's path."""
    import yaml

    from tests.helpers.tiny_model import build_base

    (folder / "base").mkdir()
    build_base(folder / "base", hidden_size=hidden, intermediate_size=4 * hidden, num_layers=layers)
    # A token is a byte or a little more: every row is cut to a whole pack.
    text = "".join(chr(97 + n % 26) for n in range(tokens + 64))
    row = json.dumps({"prompt": "Say the letters.", "completion": text}) + "\n"
    (folder / "rows.jsonl").write_text(row * (WORLD * (steps + 1)))
    held_out = [{"prompt": f"{n} + {n}", "completion": f"= {2 * n}"} for n in range(8)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(each) + "\n" for each in held_out))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings(folder, strategy=strategy, steps=steps, tokens=tokens)))
    return path


def measure(folder: Path, config: Path, arguments: list[str], *, terminal: bool) -> list[Measured]:
    """By rank. Raises ``RuntimeError`` with what was printed where a rank fails."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    log, processes = folder / "log", []
    with log.open("wb") as out:
        for rank in range(WORLD):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "WANDB_SILENT": "true",
            }  # fmt: skip
            if terminal:
                environment["TTY_COMPATIBLE"] = "1"
            command = [sys.executable, "-m", "benchmarks.everything_on", *arguments]
            command += ["--folder", str(folder), "--config", str(config)]
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}:\n{log.read_text(errors='replace')[-4000:]}")
    found_ = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD)]
    return [Measured(Side(**one.pop("on")), Side(**one.pop("off")), **one) for one in found_]


def figures(ranks: list[Measured]) -> dict[str, Any]:
    """Everything that is told, by name; ratios are ``Ratio``."""
    first = ranks[0]
    on_cpu = [sum(values) for values in zip(*(each.on.cpu_s for each in ranks), strict=True)]
    off_cpu = [sum(values) for values in zip(*(each.off.cpu_s for each in ranks), strict=True)]
    off_s, on_s = median_of(first.off.step_s), median_of(first.on.step_s)
    return {
        "pairs": len(first.on.step_s),
        "medians": ratio(first.on.step_s, first.off.step_s, median_of),
        "means": ratio(first.on.step_s, first.off.step_s, mean_of),
        "cpu": ratio(on_cpu, off_cpu, statistics.fmean),
        "off_step_s": off_s,
        "on_step_s": on_s,
        "more_s": on_s - off_s,
        "more_mean_s": mean_of(first.on.step_s) - mean_of(first.off.step_s),
        "off_cpu_s": statistics.fmean(off_cpu),
        "on_cpu_s": statistics.fmean(on_cpu),
        "more_cpu_s_by_rank": [statistics.fmean(r.on.own_cpu_s) - statistics.fmean(r.off.own_cpu_s) for r in ranks],
        "more_started_cpu_s": sum(
            statistics.fmean(r.on.started_cpu_s) - statistics.fmean(r.off.started_cpu_s) for r in ranks
        ),
        "evaluation_s": statistics.fmean(first.evaluation_s),
        "evaluation_cpu_s": sum(statistics.fmean(each.evaluation_cpu_s) for each in ranks),
    }


def told(found: dict[str, Any]) -> str:
    """For people."""
    by_rank = ", ".join(f"rank {rank} {1e6 * more:,.0f}" for rank, more in enumerate(found["more_cpu_s_by_rank"]))
    return "\n".join(
        [
            f"on / off, {found['pairs']} pairs of blocks      ratio   [95 % interval]",
            f"  wall time of a step, medians   {found['medians']}",
            f"  wall time of a step, means     {found['means']}",
            f"  CPU time of a step, all        {found['cpu']}",
            f"a step takes {1e3 * found['off_step_s']:,.1f} ms off, {1e3 * found['on_step_s']:,.1f} ms on (medians): "
            f"{1e6 * found['more_s']:,.0f} us more; {1e6 * found['more_mean_s']:,.0f} us by means",
            f"its CPU time is {1e3 * found['off_cpu_s']:,.1f} ms off, {1e3 * found['on_cpu_s']:,.1f} ms on; "
            f"us more: {by_rank}, what they have started (W&B, the page) {1e6 * found['more_started_cpu_s']:,.0f}",
            f"an evaluation with answers and scores, on neither side: {found['evaluation_s']:.2f} s, "
            f"{found['evaluation_cpu_s']:.2f} s of CPU",
            f"wall time below {GOAL}: " + ("yes" if max(found[n].value for n in ("medians", "means")) < GOAL else "no"),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20, help="blocks with everything on, and as many without")
    parser.add_argument("--block", type=int, default=20, help="steps of a block")
    parser.add_argument("--evaluate-every", type=int, default=4, help="pairs; the page is written after each")
    parser.add_argument("--strategy", default="ddp", choices=("ddp", "fsdp2", "zero1", "zero2", "zero3"))
    parser.add_argument("--tokens", type=int, default=512, help="of a rank's pack")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--terminal", action="store_true", help="with the bar of a terminal in place of lines")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--config", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.config is not None:  # of a rank
        rank_main(given.folder, given.config, pairs=given.pairs, block=given.block, evaluate_every=given.evaluate_every)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks too
    steps = WARM_UP_STEPS + 2 * given.pairs * given.block
    with tempfile.TemporaryDirectory(prefix="everything-on-") as name:
        folder = Path(name)
        config = prepare(
            folder, strategy=given.strategy, steps=steps + 1, tokens=given.tokens, layers=given.layers,
            hidden=given.hidden,
        )  # fmt: skip
        print(
            f"Llama of {given.layers} layers, hidden {given.hidden}, {given.strategy} on {WORLD} processes, "
            f"{given.tokens} tokens a rank and step",
            flush=True,
        )
        passed = ["--pairs", str(given.pairs), "--block", str(given.block)]
        passed += ["--evaluate-every", str(given.evaluate_every)]
        found = figures(measure(folder, config, passed, terminal=given.terminal))
    print(told(found))
    if given.json is not None:
        plain = {name: asdict(value) if isinstance(value, Ratio) else value for name, value in found.items()}
        given.json.write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
