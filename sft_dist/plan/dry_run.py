"""The dry run: everything that can be known of a run before a GPU is taken, from the file that starts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sft_dist.config.schema import ActivationCheckpointingConfig, Config
from sft_dist.hardware.gpus import Gpu
from sft_dist.hardware.prices import prices_of
from sft_dist.model.hub import config_source
from sft_dist.model.known import known_models_allowed
from sft_dist.plan.answers import assumptions_of_answers, planned_answers
from sft_dist.plan.assumed import AssumedData, assumed_plan
from sft_dist.plan.cache import cached_describe, cached_trace
from sft_dist.plan.calibration import Calibration, calibration_key, lookup
from sft_dist.plan.choose import Choice, NothingFits, choose, nearest
from sft_dist.plan.cost import cost_assumptions
from sft_dist.plan.data import plan_data
from sft_dist.plan.disk import disk_bytes
from sft_dist.plan.epoch import dealt
from sft_dist.plan.fit import eval_tapes, phases_of
from sft_dist.plan.host import PROCESS_BYTES, host_parts
from sft_dist.plan.machines import Machines
from sft_dist.plan.measured_rates import rated_gpu
from sft_dist.plan.memory import (
    allocated_range,
    assumptions_of_memory,
    reserved_range,
    resident_parts,
    verdict,
)
from sft_dist.plan.priced import cost_of
from sft_dist.plan.proposals import proposals
from sft_dist.plan.result import Assumption, DataPlan, MemoryPlan, Plan, TimePlan
from sft_dist.plan.time import plan_time, time_assumptions
from sft_dist.plan.units import count, gib
from sft_dist.resolve import Describe, described_once, resolve
from sft_dist.run import Run

# Less of the data than this may be cut off without a word.
LOST_SHARE = 0.02

# Where the data is not here and nothing is said of it: what a small instruction set is like.
STAND_IN = AssumedData(rows=10_000, tokens_per_row=400)


@dataclass(frozen=True)
class DryRun:
    """A plan with what it was made from.

    Args:
        config: without ``auto``.
    """

    config: Config
    run: Run
    plan: Plan


def dry_run(config: Config, machines: Machines, *, assumed: AssumedData | None = None) -> DryRun:
    """Plans ``config`` on ``machines``. Needs no GPU, no weights and no network, and writes nothing.

    Args:
        assumed: what the data is like, where its owner says so.

    Raises:
        ConfigError: the configuration contradicts itself or cannot be trained.
        PlanError: the model or the GPU is not known.
        DataError: data that is here cannot be trained on.
    """
    with known_models_allowed():
        describe = described_once(cached_describe)
        choice = _chosen(config, machines, describe)
        run = resolve(choice.config, machines.shape, describe=describe)
        data = plan_data(choice.config, run, assumed=assumed)
        plan = plan_run(choice.config, run, machines, data, choices=choice.reasons)
        if plan.memory.verdict == "does not fit":

            def plan_other(other: Config, its_machines: Machines) -> Plan:
                changed = resolve(other, its_machines.shape, describe=describe)
                same = other.data == choice.config.data
                its_data = dealt(plan.data, changed) if same else plan_data(other, changed, assumed=assumed)
                return plan_run(other, changed, its_machines, its_data)

            found = proposals(choice.config, config, machines, describe=describe, make_plan=plan_other)
            plan = replace(plan, proposals=found)
        return DryRun(choice.config, run, plan)


def _chosen(config: Config, machines: Machines, describe: Describe) -> Choice:
    """A configuration without ``auto``; that which comes nearest to fitting where nothing does."""
    try:
        return choose(config, machines.shape, memory_bytes=machines.gpu.usable_bytes, describe=describe)
    except NothingFits as error:
        return nearest(config, error)


def plan_run(
    config: Config, run: Run, machines: Machines, data: DataPlan | None, *, choices: Sequence[str] = ()
) -> Plan:
    """The plan of a resolved run.

    Args:
        config: that it was resolved from.
        data: None where nothing is known of it.
    """
    warnings = _warnings(config, run, machines)
    if data is None:
        data = assumed_plan(run, STAND_IN)
        warnings.append(
            f"data.train is not here: planned for {STAND_IN.rows:,} examples of {STAND_IN.tokens_per_row:g} tokens; "
            "say --examples N --tokens-per-example T"
        )
    if data.basis == "estimated":
        warnings.append(
            f"the model's tokenizer is not here: tokens, times and prices are estimated from the text ({data.source}); "
            "`sft-dist model fetch CONFIG --no-weights` brings it, or say --examples N --tokens-per-example T"
        )
    if data.lost_share > LOST_SHARE:
        warnings.append(
            f"{data.lost_share:.0%} of the data's tokens are not trained: data.over_length is {run.data.over_length}, "
            f"data.max_seq_len {run.data.max_seq_len:,}"
        )
    time = time_plan(run, machines, data, calibration=lookup(machines.gpu.name, calibration_key(run)))
    memory = memory_plan(config, run, machines.gpu, data, total_s=time.total.high)
    cost = cost_of(config, machines, data, time.total)
    return Plan(
        subject=_subject(run, machines),
        gpu=machines.gpu.name,
        num_gpus=machines.num_gpus,
        choices=tuple(choices),
        memory=memory,
        data=data,
        time=time,
        cost=cost,
        assumptions=(
            *assumptions_of_memory(run, machines.gpu),
            *time_assumptions(machines.gpu, time),
            *assumptions_of_answers(run, planned_answers(run, data)),
            *cost_assumptions(machines.gpu, config.hardware),
            *_assumed_network(machines),
            Assumption(f"a process takes {gib(PROCESS_BYTES)} of host memory", "Python, torch, CUDA's libraries"),
        ),
        proposals=(),
        warnings=tuple(warnings),
    )


def time_plan(run: Run, machines: Machines, data: DataPlan, *, calibration: Calibration | None) -> TimePlan:
    """How long a resolved run takes.

    Args:
        calibration: what a run like it measured on this machine; None: as published, with the rates that
            ``sft-dist calibrate`` measured where it did. A measured step says more than measured products.
    """
    eval_tape, answer_tape = eval_tapes(run, cached_trace)
    return plan_time(
        run,
        cached_trace(run),
        data=data,
        gpu=rated_gpu(machines.gpu, gpus_per_node=machines.gpus_per_node, calibration=calibration),
        network=machines.network,
        eval_tape=eval_tape,
        answer_tape=answer_tape,
        calibration=calibration,
        model_tape=cached_trace(replace(run, activation_checkpointing=ActivationCheckpointingConfig(mode="none"))),
    )


def memory_plan(config: Config, run: Run, gpu: Gpu, data: DataPlan | None, *, total_s: float) -> MemoryPlan:
    """Memory of the devices, of a node and of the disk.

    Args:
        total_s: that the whole run takes at the most.
    """
    phases = phases_of(run)
    allocated = allocated_range(phases)
    context = phases[0].parts["context"]
    needed = max(phase.total_bytes for phase in phases)
    host = config.hardware.host_memory_gib
    return MemoryPlan(
        phases=phases,
        device_bytes=gpu.memory_bytes,
        usable_bytes=gpu.usable_bytes,
        allocated=allocated,
        reserved=reserved_range(allocated, context, gpu.usable_bytes),
        verdict=verdict(needed, gpu.usable_bytes),
        host_parts=host_parts(run),
        host_available_bytes=None if host is None else int(host * 2**30),
        disk_parts=disk_bytes(run, data, total_s=total_s),
        resident_bytes=sum(resident_parts(run).values()),
    )


def _subject(run: Run, machines: Machines) -> dict[str, str]:
    model, batch, precision = run.model, run.batch, run.precision
    return {
        "model": f"{model.path}, {count(model.num_parameters)} parameters, {count(model.num_trainable)} trained",
        "method": model.method.type,
        "strategy": run.strategy,
        "machines": machines.description,
        "batch": f"{batch.global_batch_size} sequences of at most {batch.max_seq_len:,} tokens, "
        f"{batch.micro_batch_size} a micro-batch, {batch.gradient_accumulation_steps} of them a step",
        "precision": f"{precision.compute}, master {precision.master}, states {precision.optimizer_state}",
        "recomputed": run.activation_checkpointing.mode,
    }


def _assumed_network(machines: Machines) -> list[Assumption]:
    if machines.network is None or not machines.network_is_assumed:
        return []
    rate = f"{machines.network.bytes_per_s / 1e9:g} GB/s a node"
    return [Assumption(f"nodes are joined by {machines.network.name}, {rate}", "usual for this GPU: hardware.network")]


def _warnings(config: Config, run: Run, machines: Machines) -> list[str]:
    found = []
    source = config_source(config.model.path, config.model.revision)
    if source is not None:
        found.append(f"the model's own config.json is not here; in its place: {source}")
    host = config.hardware.host_memory_gib
    needed = sum(host_parts(run).values())
    if host is not None and needed > host * 2**30:
        found.append(f"a node needs {gib(needed)} of host memory, and hardware.host_memory_gib is {host:g}")
    rented = [p.ram_gib for p in prices_of(machines.gpu, user_file=config.hardware.prices) if p.ram_gib is not None]
    if host is None and rented and needed > max(rented) * 2**30:
        found.append(
            f"a node needs {gib(needed)} of host memory, and no machine in the table of prices with "
            f"{machines.gpu.name} has more than {max(rented):,.0f} GiB"
        )
    return found
