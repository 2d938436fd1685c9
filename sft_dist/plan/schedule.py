"""Seconds of a step: the tape's segments one after the other, and what travels beside them.

A GPU computes and communicates at once. What a segment needs is fetched while the one before it runs, what it made is
sent while the next ones run, and all transfers share one link; what the link cannot finish in time makes the GPU wait.
The host asks for all of this and is ahead of the GPU, which waits where it is not. Both begin a micro-batch together.
It needs no run: other stacks' tapes are played the same way.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sft_dist.plan.launches import WHOLE, Units
from sft_dist.plan.rates import Rates
from sft_dist.plan.tape import Moment, Segment, Tape
from sft_dist.sharding.collectives import Collective, Every, Pass

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
    every: Every
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
    update_host_s: float = 0.0,
    units: Units = WHOLE,
    backward: bool = True,
) -> StepTime:
    """Seconds of an optimizer step on one rank, after the first steps.

    Args:
        tape: of one micro-batch.
        collectives: of all its micro-batches and of the step.
        transfers: what else travels: to and from host memory.
        update_s: of the optimizer; update_host_s: of the host meanwhile.
        units: of sharding: each block is one, and what the tape marks inside it.
        backward: False for an evaluation: forward passes alone.
    """
    every = [*_of_links(collectives, rates), *transfers]
    total: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for when, times in _kinds_of_micro_batches({t.every for t in every}, micro_batches).items():
        copies = _copies((c for c in collectives if c.every in when), rates)
        played = _micro_batch(tape, rates, [t for t in every if t.every in when], copies, units, backward)
        for name, seconds in played.parts.items():
            total[name] += seconds * times
        hidden += played.hidden_s * times
    for transfer in every:
        if transfer.every == "step":
            total[transfer.part] += transfer.seconds
    total["optimizer"] += update_s
    total["launch gaps"] += max(0.0, update_host_s - update_s)
    return StepTime({name: seconds for name, seconds in total.items() if seconds > 0}, hidden)


def _kinds_of_micro_batches(found: set[Every], count: int) -> Counter[frozenset[Every]]:
    """How many of a step's micro-batches have what in them, of what ``found`` has."""

    def of(number: int) -> Iterator[Every]:
        yield "micro_batch"
        if number == 0 and "first_micro_batch" in found:
            yield "first_micro_batch"
        if number == count - 1 and "last_micro_batch" in found:
            yield "last_micro_batch"

    return Counter(frozenset(of(number)) for number in range(count))


def communication_seconds(collectives: Iterable[Collective], rates: Rates, *, micro_batches: int) -> float:
    """Of all collectives of a step, one after the other."""
    return sum(rates.links.seconds(c) * c.times(micro_batches) for c in collectives)


_Piece = tuple[float, float, Moment]


@dataclass
class _Stage:
    """A segment with what it waits for and what follows it; seconds.

    Args:
        pieces: seconds of the GPU and of the host, and what ends them.
        opening, closing: of the host around it, where it is a unit; gathered: how often.
    """

    pieces: list[_Piece]
    opening: float = 0.0
    closing: float = 0.0
    gathered: int = 1
    before: float = 0.0
    after: float = 0.0
    alone: dict[str, float] = field(default_factory=dict)


def _micro_batch(
    tape: Tape, rates: Rates, transfers: Sequence[Transfer], copies: dict[Pass, float], units: Units, backward: bool
) -> StepTime:
    """Forward and backward of one micro-batch."""
    parts: dict[str, float] = defaultdict(float)
    stages: dict[tuple[Pass, int | None], _Stage] = {}
    order: list[_Stage] = []
    known: dict[int, tuple[dict[str, float], list[_Piece]]] = {}
    for key, segment in _segments(tape, backward=backward):
        if id(segment) not in known:  # blocks that are alike are one
            known[id(segment)] = _seconds(segment, rates, units)
        busy, pieces = known[id(segment)]
        for name, seconds in busy.items():
            parts[name] += seconds
        stage = _stage(pieces, rates, units, of=key[0], is_block=key[1] is not None)
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
    player = _Player(units, rates.host.slowdown, rates.links.node_latency_s)
    player.play(order)
    for stage in order:
        for name, seconds in stage.alone.items():
            parts[name] += seconds
    parts["communication"] += player.waited
    parts["launch gaps"] += player.gaps
    return StepTime(dict(parts), max(0.0, sum(s.before + s.after for s in order) - player.waited))


def _seconds(segment: Segment, rates: Rates, units: Units) -> tuple[dict[str, float], list[_Piece]]:
    """Of the GPU by what takes them; and its pieces: marks count where units make the host wait for the GPU."""
    marked = segment.stretches if units.in_flight else ()
    pieces: list[_Piece] = [
        (sum(rates.work_parts(work).values()), rates.host.seconds(work), moment)
        for work, moment in marked or ((segment.work, "end"),)
    ]
    return rates.work_parts(segment.work), pieces


def _stage(pieces: list[_Piece], rates: Rates, units: Units, *, of: Pass, is_block: bool) -> _Stage:
    stage = _Stage(pieces)
    if is_block:
        again = units.recomputes and of == "backward"
        stage.gathered = 1 + again
        stage.opening = rates.host.slowdown * (units.open_s + again * (units.close_s + units.open_s))
        stage.closing = rates.host.slowdown * (units.close_s if of == "forward" else units.reduce_s)
    return stage


@dataclass
class _Player:
    """The clocks of a GPU, its host and its link, in seconds, and what the GPU waited for the other two.

    A kernel starts when it was asked for and the one before it is done. Where units are limited, the host waits before
    it gathers one until the GPU is done with the oldest but so many.
    """

    units: Units
    slowdown: float
    latency_s: float
    clock: float = 0.0
    host: float = 0.0
    link: float = 0.0
    waited: float = 0.0
    gaps: float = 0.0
    done: deque[float] = field(default_factory=deque)

    def play(self, stages: Sequence[_Stage]) -> None:
        arrives = self.link = stages[0].before
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            if stage.opening:
                self._wait_for_the_oldest()
            self.host += stage.opening
            if stage.opening and self.units.in_flight:  # asked for when it is needed; what is gathered again is not
                start = max(self.link, self.host)
                self.link, arrives = start + stage.before, start + stage.before / stage.gathered
            self.waited += max(0.0, arrives - self.clock)
            self.clock = max(self.clock, arrives)
            if following is not None and following.before and not (following.opening and self.units.in_flight):
                self.link = max(self.link, self.clock) + following.before
                arrives = self.link
            for gpu_s, host_s, moment in stage.pieces:
                self._compute(gpu_s, host_s)
                self._meet(moment)
            self.host += stage.closing
            if stage.closing:
                self.done.append(self.clock)
            self.clock += sum(stage.alone.values())
            if stage.after:
                self.link = max(self.link, self.clock) + stage.after
        self.waited += max(0.0, self.link - self.clock)

    def _compute(self, gpu_s: float, host_s: float) -> None:
        self.host += host_s
        self._not_before(self.host, self.clock + gpu_s)

    def _not_before(self, ready: float, otherwise: float) -> None:
        self.gaps += max(0.0, ready - otherwise)
        self.clock = max(ready, otherwise)

    def _meet(self, moment: Moment) -> None:
        """A unit inside a block, so small that gathering it is the latency."""
        units = self.units
        if moment == "open":
            self._wait_for_the_oldest()
            self.host += self.slowdown * units.open_s
            self._not_before(self.host + self.latency_s, self.clock)
        elif moment != "end":
            self.host += self.slowdown * (units.close_s if moment == "close" else units.reduce_s)
            self.done.append(self.clock)

    def _wait_for_the_oldest(self) -> None:
        if self.units.in_flight and len(self.done) >= self.units.in_flight:
            self.host = max(self.host, self.done.popleft())


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
    """Seconds of their copies by pass."""
    copies: dict[Pass, float] = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    for collective in collectives:
        copies[collective.of] += rates.copy_seconds(collective.copied_bytes)
    return copies
