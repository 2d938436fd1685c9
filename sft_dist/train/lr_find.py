"""``sft-dist lr-find``: steps of a run at rising rates, to see which ones it learns with; the state is thrown away."""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.data.prepared import PreparedData
from sft_dist.run import Run
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.runtime.seeding import seed_step
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.asked import NEVER
from sft_dist.train.lr_curve import LrCurve
from sft_dist.train.lr_picture import draw, in_terminal
from sft_dist.train.ready import Process, make_ready
from sft_dist.train.run_files import writing_into
from sft_dist.train.step import train_step

RESULT, PICTURE = "lr_find.json", "lr_find.svg"

# Shown while the test runs.
LINES = 10


def beside(config: Config, folder: Path) -> Config:
    """The configuration of a test: the run's own, but for what it writes, which goes to ``folder``."""
    checkpoint = config.checkpoint.model_copy(update={"mirror": None})
    return config.model_copy(update={"output_dir": str(folder), "checkpoint": checkpoint})


def find_lr(config: Config, at_rates: list[float]) -> None:
    """Trains a step at each rate until the loss diverges, and writes what came of it into ``output_dir``.

    Args:
        config: as ``beside`` makes it.

    Raises:
        SftError: as ``run_training``, but for a loss that is not finite, which ends the test.
    """
    ready = make_ready(config, resume=NEVER)
    run, process = ready.run, ready.process
    folder = Path(run.output_dir)
    with process_group(process.world, process.device, ready.store):
        curve = range_test(run, process, ready.inputs.train_data, at_rates)

        def write() -> None:
            with writing_into(folder):
                (folder / RESULT).write_text(json.dumps(curve.as_dict(), indent=1) + "\n", encoding="utf-8")
                draw(curve, folder / PICTURE)
            _show(curve, folder)

        run_on_main_first(process.world, process.store, "lr-find", write)
        dist.barrier()


def range_test(run: Run, process: Process, data: PreparedData, at_rates: list[float]) -> LrCurve:
    """The losses of a run's first steps, each at a rate of its own; every rank must call it, and gets the same.

    A step's loss is of the state before it: what a rate does shows in the step after it.
    """
    console = Console(highlight=False, quiet=not process.world.is_main)
    rank = process.world.rank
    strategy = registry.apply(run, process.device)
    verify_sharding(strategy, registry.describe(run, rank))
    order = TrainingOrder(data, run.batch, run.seed)
    curve = LrCurve((), ())
    for number, rate in enumerate(at_rates):
        seed_step(run.seed, number, rank)
        step = order.step(number)
        outcome = train_step(strategy, data, run.batch, step, rank=rank, device=process.device, lr=rate)
        curve = LrCurve((*curve.rates, rate), (*curve.losses, float(outcome.loss)))
        if number % max(1, len(at_rates) // LINES) == 0:
            console.print(f"step {number + 1}/{len(at_rates)}  lr {rate:.2e}  loss {curve.losses[-1]:.4f}")
        if curve.has_diverged:
            console.print(f"step {number + 1}/{len(at_rates)}  lr {rate:.2e}  loss {curve.losses[-1]:.4f}: diverged")
            break
    strategy.close()
    return curve


def _show(curve: LrCurve, folder: Path) -> None:
    console = Console(highlight=False)
    console.print(in_terminal(curve), markup=False, soft_wrap=True)
    for line in curve.told():
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"written: {folder / RESULT} and {folder / PICTURE}", markup=False, soft_wrap=True)
