"""What FSDP2 takes during a step, in the order of torch's ``FSDPParamGroup``: gather, copy out, reshard, reduce."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment, Tape
from sft_dist.plan.timeline import Timeline
from sft_dist.run import Run
from sft_dist.sharding.collectives import padded_numel


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Args:
        whole_bytes: gathered, in ``compute``, padded so that every rank's chunk is equally long.
        trained: elements of each parameter that trains.
        reduced_bytes: their gradients, padded, in ``reduce``.
        gradient_bytes: of this rank's chunk, in ``master``.
    """

    whole_bytes: int
    trained: tuple[int, ...]
    reduced_bytes: int
    gradient_bytes: int


class Fsdp2Timeline(Timeline):
    """``fully_shard``: a unit's shards are gathered into one buffer and copied out of it, gradients are copied into one
    and reduced. In forward the buffer stays until the next unit has its own; in backward the next unit's is filled
    while one runs, and what is reduced stays until the next unit reduces. What is not freed after forward stays for all
    micro-batches of a step. So do gradients that are reduced once a step: whole, in ``reduce``."""

    def __init__(self, run: Run, tape: Tape) -> None:
        super().__init__(run, tape)
        assert isinstance(run.sharding, Fsdp2Sharding)
        self.sharding = run.sharding
        self.shards = run.world.size // run.sharding.dp_replicate
        self.units = {name: _unit(run, name, self.shards) for name in run.model.blocks}
        self.root = _unit(run, None, self.shards)
        self.blocks = list(self.units.values())
        self.on_host = run.sharding.cpu_offload
        self.buffered = 0  # bytes of gathers that were not copied out yet
        self.reducing = 0  # bytes of the reduce-scatter that is under way
        self.kept_gradients = 0  # this rank's chunks, and what waits to be reduced
        self.waiting: Counter[str | None] = Counter()  # of that, whole gradients of a block
        self.compute, self.reduce = DTYPE_BYTES[run.precision.compute], DTYPE_BYTES[run.precision.reduce]
        self.is_first = self.is_last = True

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self.is_first, self.is_last = first, last
        if first:
            self._gather(ledger, self.root)
            self._copy_out(ledger, self.root, "gathering the embedding")
        self.kept_gradients = ledger.now["gradients"]

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        if self._adds_to_waiting and self.compute == self.reduce:  # autograd does it, a parameter at a time
            segment = segment.gradients_move
        ledger.play(segment, moment)

    def before_forward(self, ledger: Ledger, block: int) -> None:
        if not (self.is_first or self.sharding.reshard_after_forward):
            return
        moment = f"gathering layer {block}"
        unit, before = self.blocks[block], self.buffered
        self._gather(ledger, unit)
        self._free_buffer(ledger, before)
        self._copy_out(ledger, unit, moment)

    def after_forward(self, ledger: Ledger, block: int) -> None:
        if self.sharding.reshard_after_forward:
            ledger.add("gather_buffers", -self.blocks[block].whole_bytes)

    def before_backward(self, ledger: Ledger, block: int | None) -> None:
        if block is None:
            self._free_buffer(ledger, self.buffered)
            upcoming = len(self.blocks) - 1
        else:
            if self.sharding.reshard_after_forward:
                self._copy_out(ledger, self.blocks[block], f"gathering layer {block} again")
                self._free_buffer(ledger, self.buffered)
            upcoming = block - 1
        if upcoming >= 0 and self.sharding.reshard_after_forward:
            self._gather(ledger, self.blocks[upcoming])

    def after_backward(self, ledger: Ledger, block: int) -> None:
        unit = self.blocks[block]
        if self.is_last or self.sharding.reshard_after_forward:
            ledger.add("gather_buffers", -unit.whole_bytes)
        made = self.tape.backward[self.tape.recorded[block]].net["gradients"]
        self._take(ledger, self.run.model.blocks[block], unit, made, f"reducing layer {block}")

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        if last:
            ledger.add("gather_buffers", -self.root.whole_bytes)
        self._take(ledger, None, self.root, ledger.now["gradients"] - self.kept_gradients, "reducing the embedding")
        ledger.add("communication", -self.reducing)
        self.reducing = 0

    def _gather(self, ledger: Ledger, unit: Unit) -> None:
        """Fills the buffer; a world of one copies straight into the unit."""
        if self.shards > 1:
            ledger.add("gather_buffers", unit.whole_bytes, "gathering")
            self.buffered += unit.whole_bytes

    def _copy_out(self, ledger: Ledger, unit: Unit, moment: str) -> None:
        ledger.add("gather_buffers", unit.whole_bytes, moment)

    def _free_buffer(self, ledger: Ledger, size: int) -> None:
        ledger.add("gather_buffers", -size)
        self.buffered -= size

    @property
    def _adds_to_waiting(self) -> bool:
        return self.sharding.reduce_once_a_step and not self.is_first

    def _take(self, ledger: Ledger, name: str | None, unit: Unit, made: int, moment: str) -> None:
        """What becomes of the gradients of a unit's backward, ``made`` bytes."""
        if self._adds_to_waiting:
            if self.compute != self.reduce:
                ledger.add("gradients", -made)
            if self.is_last:
                waited = self.waiting.pop(name, 0)
                self.kept_gradients -= waited
                self._reduce(ledger, unit, waited, moment)
        elif self.sharding.reduce_once_a_step and not self.is_last:
            before = ledger.now["gradients"] - made
            if self.compute != self.reduce:
                for numel in unit.trained:  # each is copied, and then freed
                    ledger.add("gradients", numel * self.reduce, moment)
                    ledger.add("gradients", -numel * self.compute)
            self.waiting[name] = ledger.now["gradients"] - before
            self.kept_gradients += self.waiting[name]
        else:
            self._reduce(ledger, unit, made, moment)

    def _reduce(self, ledger: Ledger, unit: Unit, whole: int, moment: str) -> None:
        """Copies a unit's gradients, ``whole`` bytes, into the buffer that is reduced."""
        if not unit.reduced_bytes:
            return
        ledger.add("communication", -self.reducing)
        self.reducing = unit.reduced_bytes
        ledger.add("communication", unit.reduced_bytes, moment)
        ledger.add("gradients", -whole)
        ledger.touch("communication", unit.reduced_bytes // self.shards, moment)
        if self.on_host:
            return
        if not self.is_first and not self.sharding.reduce_once_a_step:  # the chunk is added to the one that is there
            ledger.touch("gradients", unit.gradient_bytes, moment)
        else:
            ledger.add("gradients", unit.gradient_bytes, moment)
            self.kept_gradients += unit.gradient_bytes


def _unit(run: Run, block: str | None, shards: int) -> Unit:
    members = run.model.members[block]
    trained = [p for p in members if p.trainable]

    reduced = sum(padded_numel(p, shards) for p in trained)
    return Unit(
        trained=tuple(p.numel for p in trained),
        whole_bytes=sum(padded_numel(p, shards) for p in members) * DTYPE_BYTES[run.precision.compute],
        reduced_bytes=reduced * DTYPE_BYTES[run.precision.reduce],
        gradient_bytes=reduced // shards * DTYPE_BYTES[run.precision.master],
    )
