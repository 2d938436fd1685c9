"""What of a device's memory is left for: how little has to be recomputed, and how large micro-batches may be.

A candidate fits where the peak that ``plan/fit.py`` plans for it is at most ``TIGHT_SHARE`` of a device's memory;
moments that may be paged out count like others.

``activation_checkpointing.mode``: the first of none, selective and full that fits, with micro-batches of one sequence
where their size is open too; full where none does, and training will show. What ``resolve`` refuses is passed over.

``train.micro_batch_size``: the largest power of two that fits, up to a rank's sequences of a step and to
``MOST_TOKENS`` on a rank; 1 where nothing fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from sft_dist.config.schema import RECOMPUTATION, Config, Recomputation, VirtualTokensMethod
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError
from sft_dist.plan.fit import peak_of
from sft_dist.plan.memory import TIGHT_SHARE
from sft_dist.plan.result import Phase
from sft_dist.plan.units import gib, percent
from sft_dist.plan.words import PARTS, PHASES
from sft_dist.resolve import Describe, resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape

# Of a micro-batch on a rank: with more of them products get no faster, and a step's micro-batches become uneven.
MOST_TOKENS = 16_384

# Parts of a peak below this share of it are told as one.
SMALL_SHARE = 0.01


@dataclass(frozen=True)
class Room:
    """What candidates are held against.

    Args:
        shape: of the processes.
        memory_bytes: of one process's device.
        describe: the model; called for every candidate.
        on_cpu: the device is the machine itself, where there is no CUDA that takes memory of its own.
    """

    shape: WorldShape
    memory_bytes: int
    describe: Describe
    on_cpu: bool = False

    @property
    def allowed(self) -> str:
        """How much a peak may take, in words."""
        return f"{percent(TIGHT_SHARE)} of {gib(self.memory_bytes)}"

    def peak(self, run: Run) -> Phase:
        """The phase that takes most, planned."""
        peak = peak_of(run)
        if not self.on_cpu:
            return peak
        return replace(peak, parts={part: size for part, size in peak.parts.items() if part != "context"})

    def holds(self, peak: Phase) -> bool:
        return peak.total_bytes <= TIGHT_SHARE * self.memory_bytes

    def run(self, config: Config) -> Run:
        """What a candidate resolves to.

        Raises:
            ConfigError: its parts do not go together.
        """
        validate(config)
        return resolve(config, self.shape, describe=self.describe)


def with_mode(config: Config, mode: Recomputation) -> Config:
    """With a mode of activation checkpointing."""
    section = config.activation_checkpointing.model_copy(update={"mode": mode})
    return config.model_copy(update={"activation_checkpointing": section})


def with_micro_batch_size(config: Config, size: int) -> Config:
    """With micro-batches of up to ``size`` sequences."""
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": size})})


def with_first_micro_batches(config: Config) -> Config:
    """With micro-batches of one sequence where their size is open."""
    return with_micro_batch_size(config, 1) if config.train.micro_batch_size == "auto" else config


def least_recomputation(config: Config, room: Room) -> tuple[Recomputation, str]:
    """What ``activation_checkpointing.mode`` becomes, and why.

    Raises:
        ConfigError: no mode goes with the rest.
    """
    config = with_first_micro_batches(config)
    passed: dict[Recomputation, str] = {}
    refusals: list[ConfigError] = []
    last: tuple[Recomputation, Phase] | None = None
    for mode in RECOMPUTATION:
        try:
            run = room.run(with_mode(config, mode))
        except ConfigError as refusal:
            refusals.append(refusal)
            passed[mode] = f"{mode} is refused ({refusal.what})"
            continue
        peak = room.peak(run)
        last = mode, peak
        if room.holds(peak):
            return mode, "; ".join([f"{mode}: {_in_parts(peak)}, within {room.allowed}", *passed.values()])
        passed[mode] = f"{mode} takes {gib(peak.total_bytes)}"
    if last is None:
        raise refusals[0]
    costliest, peak = last
    reason = f"{costliest}, but nothing fits: {_in_parts(peak)}, more than {room.allowed}"
    return costliest, "; ".join([reason, *(why for mode, why in passed.items() if mode != costliest)])


def largest_micro_batch_size(config: Config, room: Room) -> tuple[int, str]:
    """What ``train.micro_batch_size`` becomes, and why.

    Args:
        config: with a mode of activation checkpointing.

    Raises:
        ConfigError: not even micro-batches of one sequence go with the rest.
    """
    most, limit = _most_sequences(config, room.run(with_micro_batch_size(config, 1)).batch.world_size)

    @cache
    def peak(size: int) -> Phase | None:
        """None where the run is refused."""
        try:
            return room.peak(room.run(with_micro_batch_size(config, size)))
        except ConfigError:
            return None

    def fits(size: int) -> bool:
        found = peak(size)
        return found is not None and room.holds(found)

    size = _largest(most, fits)
    taken = peak(size)
    assert taken is not None
    if not room.holds(taken):
        return size, f"{size}, but nothing fits: {_in_parts(taken)}, more than {room.allowed}"
    why = limit
    if size < most:
        more = peak(2 * size)
        why = f"{2 * size} is refused" if more is None else f"{2 * size} takes {gib(more.total_bytes)}"
    return size, f"{size}: {_in_parts(taken)}, within {room.allowed}; {why}"


def micro_batch_sizes(config: Config, shape: WorldShape) -> list[int]:
    """Powers of two, within a rank's sequences of a step and ``MOST_TOKENS``, and the size that the file says."""
    ranks = max(1, shape.size // config.sharding.sequence_parallel)
    most, _ = _most_sequences(config, ranks)
    sizes = {1 << power for power in range(most.bit_length())}
    said = config.train.micro_batch_size
    if said != "auto" and said <= -(-config.train.global_batch_size // ranks):
        sizes.add(said)
    return sorted(sizes)


def _most_sequences(config: Config, ranks: int) -> tuple[int, str]:
    """The largest power of two that a micro-batch may have beside memory, and why it is no larger.

    Args:
        ranks: data-parallel ones; where ranks share sequences, groups of such ranks.
    """
    own = -(-config.train.global_batch_size // ranks)
    extra = config.method.num_virtual_tokens if isinstance(config.method, VirtualTokensMethod) else 0
    within = max(1, MOST_TOKENS * config.sharding.sequence_parallel // (config.data.max_seq_len + extra))
    most = 1 << (min(own, within).bit_length() - 1)
    if 2 * most > own:
        return most, f"a rank has {own} of a step's {config.train.global_batch_size} sequences"
    return most, f"{2 * most} have more than {MOST_TOKENS:,} tokens on a rank"


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest power of two up to ``most``, which is one, that fits; 1 where none does. What fits halves too."""
    if fits(most):
        return most
    if not fits(1):
        return 1
    low, high = 0, most.bit_length() - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(1 << middle) else (low, middle)
    return 1 << low


def _in_parts(peak: Phase) -> str:
    """``weights 15.0 GiB + ... = 46.1 GiB at the peak (optimizer step: update)``, the largest first."""
    large = {part: size for part, size in peak.parts.items() if size >= SMALL_SHARE * peak.total_bytes}
    named = [f"{PARTS[part][1]} {gib(size)}" for part, size in sorted(large.items(), key=lambda part: -part[1])]
    rest = peak.total_bytes - sum(large.values())
    if gib(rest) != gib(0):
        named.append(f"rest {gib(rest)}")
    moment = f"{PHASES[peak.name]}: {peak.moment}" if peak.moment else PHASES[peak.name]
    return f"{' + '.join(named)} = {gib(peak.total_bytes)} at the peak ({moment})"
