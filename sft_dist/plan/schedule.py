"""Seconds of a step: the tape's segments one after the other, and what travels beside them.

A GPU computes and communicates at once. What a segment needs is fetched while the one before it runs, what it made is
sent while the next ones run, and all transfers share one link; what the link cannot finish in time makes the GPU wait.
It needs no run: other stacks' tapes are played the same way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sft_dist.plan.rates import Rates
from sft_dist.plan.tape import Segment, Tape
from sft_dist.sharding.collectives import Collective, Pass

WORK_PARTS = ("matrix products", "attention", "element-wise", "dequantising")


@dataclass(frozen=True)
class Transfer:
    """Something between the GPU and elsewhere.

    Args:
        of, every, block: as of a ``Collective``.
        when: ``before`` a segment, which waits for it; ``after`` it, which made it.
        overlaps: whether the GPU computes meanwhile.
        part: what its seconds count as where the GPU waits.
    """

    seconds: float
    of: Pass
    every: Literal["micro_batch", "last_micro_batch", "step"]
    block: int | None
    when: Literal["before", "after"]
    overlaps: bool = True
    part: str = "communication"


@dataclass(frozen=True)
class StepTime:
    """Of one optimizer step of a rank.

    Args:
        parts: seconds by what takes them; they add up to ``total_s``. ``communication`` and ``offload`` are what the
            GPU waits for, ``launch gaps`` what it waits for the host.
        hidden_s: of communication and offload, behind computation.
    """

    parts: dict[str, float]
    hidden_s: float

    @property
    def total_s(self) -> float:
        return sum(self.parts.values())

    @property
    def busy_s(self) -> float:
        """Of the GPU's own work in forward and backward."""
        return sum(self.parts.get(name, 0.0) for name in WORK_PARTS)


def step_time(
    tape: Tape,
    *,
    rates: Rates,
    collectives: Sequence[Collective] = (),
    micro_batches: int,
    transfers: Iterable[Transfer] = (),
    update_s: float = 0.0,
    backward: bool = True,
) -> StepTime:
    """Seconds of an optimizer step on one rank, after the first steps.

    Args:
        tape: of one micro-batch.
        collectives: of all its micro-batches and of the step.
        transfers: what else travels: to and from host memory.
        update_s: of the optimizer.
        backward: False for an evaluation: forward passes alone.
    """
    every = [*_of_links(collectives, rates), *transfers]
    copies = _copies(collectives, rates)
    total: dict[str, float] = defaultdict(float)
    hidden = 0.0
    usual = [t for t in every if t.every == "micro_batch"]
    last = [t for t in every if t.every != "step"]
    ends = _micro_batch(tape, rates, last, copies, backward=backward)
    other = ends
    if micro_batches > 1 and len(last) > len(usual):
        other = _micro_batch(tape, rates, usual, copies, backward=backward)
    for played, times in ((other, micro_batches - 1), (ends, 1)):
        if times:
            for name, seconds in played.parts.items():
                total[name] += seconds * times
            hidden += played.hidden_s * times
    for transfer in every:
        if transfer.every == "step":
            total[transfer.part] += transfer.seconds
    total["optimizer"] += update_s
    return StepTime({name: seconds for name, seconds in total.items() if seconds > 0}, hidden)


def communication_seconds(collectives: Iterable[Collective], rates: Rates, *, micro_batches: int) -> float:
    """Of all collectives of a step, one after the other."""
    times = {"micro_batch": micro_batches, "last_micro_batch": 1, "step": 1}
    return sum(rates.links.seconds(c) * times[c.every] for c in collectives)


@dataclass
class _Stage:
    """A segment with what it waits for and what follows it; seconds."""

    compute: float
    before: float = 0.0
    after: float = 0.0
    alone: dict[str, float] = field(default_factory=dict)


def _micro_batch(
    tape: Tape, rates: Rates, transfers: Sequence[Transfer], copies: dict[Pass, float], *, backward: bool
) -> StepTime:
    """Forward and backward of one micro-batch."""
    parts: dict[str, float] = defaultdict(float)
    stages: dict[tuple[Pass, int | None], _Stage] = {}
    order: list[_Stage] = []
    known: dict[int, tuple[dict[str, float], float, float]] = {}
    for key, segment in _segments(tape, backward=backward):
        if id(segment) not in known:  # blocks that are alike are one
            known[id(segment)] = _seconds(segment, rates)
        busy, gap, whole = known[id(segment)]
        for name, seconds in busy.items():
            parts[name] += seconds
        parts["launch gaps"] += gap
        stage = _Stage(whole)
        order.append(stage)
        # What is of no block is gathered before the first segment, and reduced behind the last.
        first_of_pass = key[0] == "forward" and key not in stages
        if key[1] is not None or first_of_pass or key[0] == "backward":
            stages[key] = stage
    for transfer in transfers:
        stage = stages[transfer.of, transfer.block]
        if not transfer.overlaps:
            stage.alone[transfer.part] = stage.alone.get(transfer.part, 0.0) + transfer.seconds
        elif transfer.when == "before":
            stage.before += transfer.seconds
        else:
            stage.after += transfer.seconds
    copied = copies["forward"] + (copies["backward"] if backward else 0.0)
    parts["element-wise"] += copied
    waited, hidden = _play(order)
    for stage in order:
        for name, seconds in stage.alone.items():
            parts[name] += seconds
    parts["communication"] += waited
    return StepTime(dict(parts), hidden)


def _seconds(segment: Segment, rates: Rates) -> tuple[dict[str, float], float, float]:
    """(of the GPU by what takes them, that it waits for the host, all together)."""
    busy = rates.work_parts(segment.work)
    computed = sum(busy.values())
    gap = max(0.0, rates.launch_seconds(segment.work) - computed)
    return busy, gap, computed + gap


def _play(stages: Sequence[_Stage]) -> tuple[float, float]:
    """(seconds that the GPU waits for the link, seconds of the link behind computation)."""
    clock = link = waited = 0.0
    arrives = link = stages[0].before
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        waited += max(0.0, arrives - clock)
        clock = max(clock, arrives)
        if following is not None and following.before:
            link = max(link, clock) + following.before
            arrives = link
        clock += stage.compute + sum(stage.alone.values())
        if stage.after:
            link = max(link, clock) + stage.after
    waited += max(0.0, link - clock)
    return waited, max(0.0, sum(s.before + s.after for s in stages) - waited)


def _segments(tape: Tape, *, backward: bool) -> list[tuple[tuple[Pass, int | None], Segment]]:
    """(pass, block) of every segment in the order in which they run."""
    blocks = range(len(tape.recorded))
    found: list[tuple[tuple[Pass, int | None], Segment]] = [(("forward", None), tape.embed)]
    found += [(("forward", i), tape.forward[tape.recorded[i]]) for i in blocks]
    found += [(("forward", None), tape.head)]
    if backward:
        found += [(("backward", None), tape.head_backward)]
        found += [(("backward", i), tape.backward[tape.recorded[i]]) for i in reversed(blocks)]
        found += [(("backward", None), tape.embed_backward)]
    return found


def _of_links(collectives: Iterable[Collective], rates: Rates) -> Iterator[Transfer]:
    """Blocks are mostly alike, and so is what travels for them."""
    known: dict[tuple[object, ...], float] = {}
    for c in collectives:
        like = (c.kind, c.size_bytes, id(c.group))
        if like not in known:
            known[like] = rates.links.seconds(c)
        when: Literal["before", "after"] = "before" if c.kind == "all_gather" else "after"
        yield Transfer(known[like], c.of, c.every, c.block, when, c.overlaps)


def _copies(collectives: Iterable[Collective], rates: Rates) -> dict[Pass, float]:
    """Seconds of a micro-batch's copies by pass."""
    copies: dict[Pass, float] = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for collective in collectives:
        if collective.every == "micro_batch":
            copies[collective.of] += rates.copy_seconds(collective.copied_bytes)
    return copies
