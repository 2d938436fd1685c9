"""``sft-dist plan --probe N``: some real steps of a configuration on the hardware that is here, beside their plan."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sft_dist.config.schema import Config
from sft_dist.data.cache import Cache, cache_path
from sft_dist.data.loader import Step, TrainingOrder
from sft_dist.data.packing import Packs
from sft_dist.data.prepare import find_set
from sft_dist.data.prepared import PreparedData, open_prepared
from sft_dist.errors import CheckpointError, PlanError, TrainingDiverged
from sft_dist.model.hub import ModelNotHere
from sft_dist.model.renderer import renderer_of
from sft_dist.model.weights import check_weights
from sft_dist.plan.assumed import AssumedData
from sft_dist.plan.calibration import LEAST_STEPS, calibration_key
from sft_dist.plan.command import Views, show
from sft_dist.plan.data import MAX_SAMPLE_ROWS, counted_plan, plan_data, source_files
from sft_dist.plan.dry_run import plan_run
from sft_dist.plan.expected import Expected, expect
from sft_dist.plan.fit import phases_of
from sft_dist.plan.machines import Machines, machines_here
from sft_dist.plan.result import PhaseName
from sft_dist.plan.sampled import sampled_set
from sft_dist.plan.units import gib, rate, step_seconds
from sft_dist.run import Run
from sft_dist.runtime.memory import most_allocated_bytes
from sft_dist.runtime.process_group import device_of, join, process_group
from sft_dist.runtime.seeding import seed_step
from sft_dist.runtime.world import World
from sft_dist.sharding import registry
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.account import WARM_UP_STEPS, StepFigures
from sft_dist.train.ready import Process, decide
from sft_dist.train.receipt import calibrate
from sft_dist.train.resume import holds_a_run
from sft_dist.train.step import train_step

# What a probe goes through.
PHASES: tuple[PhaseName, ...] = ("load", "forward_backward", "optimizer_step")

# Where the run's rows are not here.
SYNTHETIC_STEPS = 4


@dataclass(frozen=True)
class Probe:
    """What was measured.

    Args:
        figures: of the steps after those that warm up.
        peak_allocated_bytes: of the rank that needed most; None on a CPU.
        data: what was trained on, for people.
    """

    figures: StepFigures
    peak_allocated_bytes: int | None
    data: str


def probe(config: Config, *, steps: int, stated: AssumedData | None, views: Views) -> None:
    """Plans a configuration for the hardware that is here, trains ``steps`` steps after two that warm up, and compares.

    Writes ``plan.json`` where the GPU is known and no run has begun, and nothing else into ``output_dir``; on a GPU of
    the table also the calibration that the next plan starts from.

    Args:
        stated: what the data is like, for the plan; the steps train what is here.

    Raises:
        SftError: as ``run_training``.
        PlanError: the device has too little memory.
    """
    world = World.from_environment()
    store = join(world)
    process = Process(world, device_of(world), dist.PrefixStore("sft_dist", store))
    config, run = decide(config, process)
    machines = None
    if process.device.type == "cuda":
        machines = machines_here(config.hardware, world.shape, torch.cuda.get_device_name(process.device))
        if world.is_main:
            plan = plan_run(config, run, machines, plan_data(config, run, assumed=stated))
            folder = Path(config.output_dir)
            show(plan, None if holds_a_run(folder) else folder, views)
    check_weights(run.model)
    data, source = probe_data(config, run)
    # Before there is a process group: a plan of ranks that share sequences makes one of its own.
    whole, _ = expect(config, run, machines, counted_plan(run, data, None, source=source))
    expected = replace(whole, peak_allocated_bytes=planned_peak_bytes(run))
    with process_group(world, process.device, store):
        found = train_some(run, data, process, steps=steps, source=source)
        if world.is_main:
            tell(run, expected, found, machines, Console(highlight=False))
        dist.barrier()


def probe_data(config: Config, run: Run) -> tuple[PreparedData, str]:
    """The run's own prepared data; else a sample of its files; else full packs of random ids; and which, for people.

    The same on every rank. Writes nothing.
    """
    try:
        load = renderer_of(config.model, run.data)
        renderer = load()
    except (ModelNotHere, CheckpointError):
        return synthetic_data(run), "packs of random ids: the tokenizer is not here"
    folder = find_set(run.data, Cache(cache_path(run.data, run.output_dir), renderer, load), seed=run.seed)
    if folder is not None:
        return open_prepared(folder), f"the run's own, prepared in {folder}"
    files = source_files(run, "train")
    if files is None:
        return synthetic_data(run), "packs of random ids: data.train is not here"
    data, told = sampled_set(run, renderer, files, max_sample_rows=MAX_SAMPLE_ROWS, seed=run.seed)
    return data, f"the run's own, {told}"


def synthetic_data(run: Run) -> PreparedData:
    """Full sequences of one row each, of which all tokens are trained: as much as a step can take."""
    batch = run.batch
    number = SYNTHETIC_STEPS * batch.global_batch_size
    ids = np.random.Generator(np.random.PCG64(run.seed)).integers(
        run.model.vocab_size, size=(number, batch.max_seq_len), dtype=np.int32
    )
    trained = np.ones(batch.max_seq_len, np.uint8)
    return PreparedData.of([(row, trained) for row in ids], Packs.single(number))


def train_some(run: Run, data: PreparedData, process: Process, *, steps: int, source: str) -> Probe:
    """Loads the model, trains, and forgets it. The first step takes the longest sequences, for the peak of memory.

    Raises:
        PlanError: the device has too little memory.
        TrainingDiverged: a loss is not finite.
    """
    device = process.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        strategy = registry.apply(run, device)
        verify_sharding(strategy, registry.describe(run, process.world.rank))
        order = TrainingOrder(data, run.batch, run.seed)
        full_size = min(run.batch.global_batch_size, data.num_sequences)
        timed: list[tuple[float, int]] = []
        number = 0
        while len(timed) < steps:
            step = longest_step(data, full_size) if number == 0 else order.step(number)
            seconds = _one_step(run, strategy, data, step, process, number=number)
            if number >= WARM_UP_STEPS and len(step.sequences) == full_size:
                timed.append((seconds, step.num_tokens))
            number += 1
        peak = most_allocated_bytes(device)
        strategy.close()
    except torch.OutOfMemoryError as error:
        raise PlanError(
            f"the probe ran out of device memory: {str(error).splitlines()[0]}",
            fix="see what `sft-dist plan` proposes, and close what else uses the GPU",
        ) from error
    took = [seconds for seconds, _ in timed]
    figures = StepFigures(len(timed), statistics.median(took), sum(tokens for _, tokens in timed) / sum(took))
    return Probe(figures, peak, source)


def longest_step(data: PreparedData, size: int) -> Step:
    """A step of the sequences with most tokens."""
    sequences = np.argsort(-data.num_tokens, kind="stable")[:size]
    return Step(
        epoch=0,
        sequences=sequences,
        num_tokens=int(data.num_tokens[sequences].sum()),
        supervised_tokens=int(data.num_supervised[sequences].sum()),
    )


def _one_step(run: Run, strategy: Strategy, data: PreparedData, step: Step, process: Process, *, number: int) -> float:
    """Seconds of a step, until the device has done it."""
    started, rank = time.perf_counter(), process.world.rank
    seed_step(run.seed, number, rank)
    # The schedule of a run of any length starts like this; what a step takes does not depend on it.
    lr = learning_rate(run.optim, number, run.max_steps or 1000)
    outcome = train_step(strategy, data, run.batch, step, rank=rank, device=process.device, lr=lr)
    loss = float(outcome.loss)
    if process.device.type == "cuda":
        torch.cuda.synchronize(process.device)
    if not math.isfinite(loss):
        raise TrainingDiverged(f"step {number + 1} of the probe: loss {loss}", fix="lower optim.lr")
    return time.perf_counter() - started


def planned_peak_bytes(run: Run) -> int:
    """Of what a probe goes through: it neither evaluates nor saves."""
    return max(phase.allocated_bytes for phase in phases_of(run) if phase.name in PHASES)


def tell(run: Run, expected: Expected, found: Probe, machines: Machines | None, console: Console) -> None:
    """Prints the comparison, and keeps it where the GPU is known."""
    figures = found.figures
    where = f"{run.world.size} x {'CPU process' if machines is None else machines.gpu.name}"
    told = f"probe: {figures.steps} steps on {where} under {run.strategy}, after {WARM_UP_STEPS} that warm up; data: "
    console.print(told + escape(found.data), soft_wrap=True)
    table = Table(box=None)
    for heading in ("", "planned", "measured", "measured/planned"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = (
        ("peak of device memory", gib, float(expected.peak_allocated_bytes), found.peak_allocated_bytes),
        ("a step", step_seconds, expected.step_s, figures.step_s),
        ("tokens per second", rate, expected.tokens_per_s, figures.tokens_per_s),
    )
    for what, text, planned, measured in rows:
        both = f"{measured / planned:.3f}" if planned and measured is not None else "-"
        table.add_row(what, *("-" if value is None else text(value) for value in (planned, measured)), both)
    console.print(table)
    console.print(_kept(run, expected, found, machines), soft_wrap=True)


def _kept(run: Run, expected: Expected, found: Probe, machines: Machines | None) -> str:
    """Keeps the measurement; what became of it."""
    if machines is None:
        return "nothing was kept: a CPU counts no device memory, and its seconds say nothing of a GPU's"
    figures = found.figures
    try:
        kept = calibrate(
            run, machines.gpu.name, expected,
            step_s=figures.step_s, steps=figures.steps, peak_bytes=found.peak_allocated_bytes,
        )  # fmt: skip
    except OSError as error:
        return f"nothing was kept: {error}; set SFT_DIST_CACHE to a folder that can be written to"
    if not kept:
        return f"nothing was kept: fewer than {LEAST_STEPS} steps say too little, or the figures are beyond belief"
    return f"kept: plans of {calibration_key(run)} on {machines.gpu.name} start from it"
