"""Smallest changes that make a run fit its devices, each planned as a run of its own.

Changes have weights: what costs only time weighs little, what changes the machines more, and what is
trained most.
Combinations are tried in the order of their weight; one that changes all that a lighter proposal changes is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

from sft_dist.config.schema import ActivationCheckpointingConfig, AdamWConfig, Config, Fsdp2Sharding, Zero3Sharding
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError
from sft_dist.hardware.gpus import Gpu
from sft_dist.plan.candidates import COUNTS, FULL_NODE, as_method, gpus_to_search, machines_for
from sft_dist.plan.fit import eval_tapes
from sft_dist.plan.host import host_parts
from sft_dist.plan.machines import Machines
from sft_dist.plan.memory import context_bytes, memory_phases, resident_parts, verdict
from sft_dist.plan.money import format_usd
from sft_dist.plan.overrides import key_override, section_overrides
from sft_dist.plan.result import Change, Plan
from sft_dist.plan.room import with_micro_batch_size
from sft_dist.plan.tapes import Tapes
from sft_dist.plan.units import duration, gib
from sft_dist.resolve import Describe, resolve

MOST_PROPOSALS = 6
MOST_CHANGES = 3
# Combinations that are looked at.
MOST_TRIED = 400
# Nodes that are proposed at most.
MOST_NODES = 8
LEAST_TOKENS = 512


@dataclass(frozen=True)
class Step:
    """One change.

    Args:
        of: what it changes; a combination changes each thing once.
        weight: of the change, see the module.
        says: what it is, for people.
        apply: None where it is no change, or cannot be one.
    """

    of: str
    weight: float
    says: str
    apply: Callable[[Config, Machines], tuple[Config, Machines] | None]


# Plans a configuration on machines.
MakePlan = Callable[[Config, Machines], Plan]


def proposals(
    config: Config, original: Config, machines: Machines, *, describe: Describe, make_plan: MakePlan
) -> tuple[Change, ...]:
    """At most ``MOST_PROPOSALS``, the smallest first.

    Args:
        config: that does not fit, without ``auto``; original: that it was made from, which the overrides are of.
        make_plan: a plan of a configuration without ``auto``.
    """
    trying = _Trying(describe)
    found: list[tuple[frozenset[str], Change]] = []
    for steps in _in_order(steps_for(config, machines)):
        of = frozenset(step.of for step in steps)
        if any(known <= of for known, _ in found):
            continue
        changed = _applied(steps, config, machines)
        if changed is None or not trying.fits(*changed):
            continue
        reason = f"{', '.join(step.says for step in steps)}: {_numbers(make_plan(*changed))}"
        found.append((of, Change(overrides_of(original, *changed), reason, True)))
        if len(found) == MOST_PROPOSALS or trying.number == MOST_TRIED:
            break
    return tuple(change for _, change in found)


class _Trying:
    """Whether configurations fit."""

    def __init__(self, describe: Describe) -> None:
        self.describe, self.tapes, self.number = describe, Tapes(), 0

    def fits(self, config: Config, machines: Machines) -> bool:
        self.number += 1
        try:
            validate(config)
            run = resolve(config, machines.shape, describe=self.describe)
        except ConfigError:  # its parts do not go together: no proposal
            return False
        there = config.hardware.host_memory_gib
        if there is not None and sum(host_parts(run).values()) > there * 2**30:
            return False
        usable = machines.gpu.usable_bytes
        if verdict(sum(resident_parts(run).values()) + context_bytes(run), usable) == "does not fit":
            return False
        phases = memory_phases(run, self.tapes.of(run), *eval_tapes(run, self.tapes.of))
        return verdict(max(phase.total_bytes for phase in phases), usable) != "does not fit"


def steps_for(config: Config, machines: Machines) -> list[Step]:
    """Every change that makes sense for a configuration, alone or with others."""
    return [
        *_batch_steps(),
        *_recomputation_steps(config),
        *_sharding_steps(machines),
        *_precision_steps(config),
        *_machine_steps(config, machines),
        *_training_steps(config),
    ]


def _batch_steps() -> Iterator[Step]:
    yield Step("micro-batch", 1, "micro-batches of one sequence", lambda c, m: (with_micro_batch_size(c, 1), m))


def _recomputation_steps(config: Config) -> Iterator[Step]:
    def to(wanted: ActivationCheckpointingConfig) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: (c.model_copy(update={"activation_checkpointing": wanted}), m)

    own = config.activation_checkpointing
    known = ["none", "selective", "full"]
    at = known.index(own.mode) if own.mode in known else 0
    if at < 1:
        yield Step(
            "recomputation",
            1,
            "recompute all but the dearest operators",
            to(ActivationCheckpointingConfig(mode="selective")),
        )
    if at < 2:
        yield Step("recomputation", 1.5, "recompute every layer", to(ActivationCheckpointingConfig(mode="full")))
    if not own.offload:
        offloaded = ActivationCheckpointingConfig(mode="full", offload=True)
        yield Step("recomputation", 2, "recompute every layer from inputs in host memory", to(offloaded))


def _sharding_steps(machines: Machines) -> Iterator[Step]:
    def fsdp2(c: Config, m: Machines) -> tuple[Config, Machines]:
        sharding = Fsdp2Sharding(strategy="fsdp2", sequence_parallel=c.sharding.sequence_parallel)
        return c.model_copy(update={"sharding": sharding}), m

    def zero3(c: Config, m: Machines) -> tuple[Config, Machines]:
        sharding = Zero3Sharding(strategy="zero3", sequence_parallel=c.sharding.sequence_parallel)
        return c.model_copy(update={"sharding": sharding}), m

    def on_host(c: Config, m: Machines) -> tuple[Config, Machines]:
        sharding = Fsdp2Sharding(strategy="fsdp2", cpu_offload=True, sequence_parallel=c.sharding.sequence_parallel)
        return c.model_copy(update={"sharding": sharding}), m

    def shared(size: int) -> Callable[[Config, Machines], tuple[Config, Machines] | None]:
        def apply(c: Config, m: Machines) -> tuple[Config, Machines] | None:
            if m.gpus_per_node % size:
                return None
            return c.model_copy(update={"sharding": c.sharding.model_copy(update={"sequence_parallel": size})}), m

        return apply

    if machines.num_gpus > 1:
        yield Step("sharding", 1, "shard parameters, gradients and optimizer with FSDP2", fsdp2)
        yield Step("sharding", 1.5, "shard them with ZeRO-3", zero3)
    yield Step("sharding", 4, "keep parameters and optimizer in host memory", on_host)
    for size in (2, 4, 8):
        if machines.gpus_per_node % size == 0:
            yield Step("sequences", 3 + size / 8, f"share each sequence among {size} GPUs", shared(size))


def _precision_steps(config: Config) -> Iterator[Step]:
    def states(**changes: str) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: (c.model_copy(update={"precision": c.precision.model_copy(update=changes)}), m)

    if not isinstance(config.optim, AdamWConfig):
        return
    yield Step("states", 5, "keep the optimizer's moments in 8 bits", states(optimizer_state="8bit"))
    yield Step("states", 5.5, "keep the optimizer's moments in bf16", states(optimizer_state="bf16"))
    bf16 = states(master="bf16", reduce="bf16", optimizer_state="bf16")
    yield Step("states", 6, "keep master weights and moments in bf16", bf16)


def _machine_steps(config: Config, machines: Machines) -> Iterator[Step]:
    def more(nodes: int, count: int) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: _on(c, m.gpu, nodes, count)

    def other(gpu: Gpu) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: _on(c, gpu, m.nodes, m.gpus_per_node)

    larger = [(1, count) for count in COUNTS if machines.nodes == 1 and count > machines.gpus_per_node]
    nodes = machines.nodes * 2
    while nodes <= MOST_NODES:
        larger.append((nodes, max(FULL_NODE, machines.gpus_per_node)))
        nodes *= 2
    for number, (nodes, count) in enumerate(larger):
        said = f"{count} GPUs" if nodes == 1 else f"{nodes} nodes of {count} GPUs"
        yield Step("GPUs", 4.5 + number, said, more(nodes, count))
    anywhere = config.model_copy(update={"hardware": config.hardware.model_copy(update={"gpu": None})})
    own = (config.hardware.price_per_hour, config.hardware.price_per_hour_jpy, config.hardware.owned)
    if any(price is not None for price in own):  # it is of the GPU that is there
        return
    for number, gpu in enumerate(reversed(gpus_to_search(anywhere))):
        if gpu.usable_bytes > machines.gpu.usable_bytes and config.precision.compute in gpu.flops:
            yield Step("GPU", 4.6 + number / 4, f"on {gpu.name}", other(gpu))


def _training_steps(config: Config) -> Iterator[Step]:
    def method(name: str) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: (c.model_copy(update={"method": as_method(c.method, name)}), m)

    def at_most(tokens: int) -> Callable[[Config, Machines], tuple[Config, Machines]]:
        return lambda c, m: (c.model_copy(update={"data": c.data.model_copy(update={"max_seq_len": tokens})}), m)

    if config.method.type == "full":
        yield Step("method", 7, "train LoRA adapters in place of all weights", method("lora"))
    if config.method.type in ("full", "lora"):
        yield Step("method", 7.5, "train LoRA adapters on 4-bit weights", method("qlora"))
    tokens, weight = config.data.max_seq_len // 2, 6.5
    while tokens >= LEAST_TOKENS:
        yield Step("length", weight, f"sequences of at most {tokens:,} tokens", at_most(tokens))
        tokens, weight = tokens // 2, weight + 1


def _on(config: Config, gpu: Gpu, nodes: int, gpus_per_node: int) -> tuple[Config, Machines]:
    machines, _ = machines_for(config, gpu, nodes, gpus_per_node)
    update = {"gpu": gpu.name, "nodes": nodes, "gpus_per_node": gpus_per_node}
    return config.model_copy(update={"hardware": config.hardware.model_copy(update=update)}), machines


def _in_order(steps: list[Step]) -> list[tuple[Step, ...]]:
    """Combinations of changes of different things, the lightest first."""
    found = [
        each
        for number in range(1, MOST_CHANGES + 1)
        for each in combinations(steps, number)
        if len({step.of for step in each}) == number
    ]
    # Beside what only costs time, one thing at a time.
    cheap = {"micro-batch", "recomputation"}
    found = [each for each in found if sum(step.of not in cheap for step in each) <= 2]
    return sorted(found, key=lambda each: sum(step.weight for step in each))


def _applied(steps: tuple[Step, ...], config: Config, machines: Machines) -> tuple[Config, Machines] | None:
    """None where a step has nothing to change, or one undoes another."""
    for step in steps:
        changed = step.apply(config, machines)
        if changed is None or (changed[0] == config and changed[1] == machines):
            return None
        config, machines = changed
    return config, machines


def overrides_of(original: Config, config: Config, machines: Machines) -> tuple[str, ...]:
    """What turns the configuration of a file into one without ``auto``, on other machines."""
    _, said = machines_for(original, machines.gpu, machines.nodes, machines.gpus_per_node)
    return (
        *said,
        *section_overrides("method", original.method, config.method),
        *section_overrides("sharding", original.sharding, config.sharding),
        *section_overrides("precision", original.precision, config.precision),
        *section_overrides(
            "activation_checkpointing", original.activation_checkpointing, config.activation_checkpointing
        ),
        *key_override("train.micro_batch_size", original.train.micro_batch_size, config.train.micro_batch_size),
        *key_override("data.max_seq_len", original.data.max_seq_len, config.data.max_seq_len),
    )


def _numbers(plan: Plan) -> str:
    """``61.3 of 79.1 GiB, 3 h 20 min, $12.30``; what a node needs of host memory where it is much."""
    peak, usable = plan.memory.peak.total_bytes, plan.memory.usable_bytes
    tight = " (tight)" if plan.memory.verdict == "tight" else ""
    said = [f"{gib(peak)} of {gib(usable)}{tight}", duration(plan.time.total.value)]
    if plan.cost.chosen is not None:
        said.append(format_usd(plan.cost.chosen.usd.value))
    offloaded = sum(plan.memory.host_parts.get(part, 0) for part in ("offloaded states", "offloaded activations"))
    if offloaded:
        said.append(f"{gib(sum(plan.memory.host_parts.values()))} of host memory a node")
    return ", ".join(said)
