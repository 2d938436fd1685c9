"""Plays the tape of a micro-batch with what each strategy puts between its segments.

What is allocated when follows the libraries' own order of events: torch's ``FSDPParamGroup`` (gather, copy out,
reshard, reduce-scatter), DDP's reducer, and DeepSpeed's optimizers. A ``Timeline`` plays forward and backward of
micro-batches; ``plan/memory.py`` puts states, update, evaluation and saving around it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.model.spec import DTYPE_BYTES, ParameterSpec
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment, Tape
from sft_dist.run import Run

# DDP's default bucket_cap_mb.
DDP_BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together.

    Args:
        whole_bytes: gathered, in ``compute``, padded so that every rank's chunk is equally long.
        reduced_bytes: the gradients of all that train, padded, in ``reduce``.
        gradient_bytes: of this rank's chunk, in ``master``.
    """

    whole_bytes: int
    reduced_bytes: int
    gradient_bytes: int


class Timeline:
    """Forward and backward of micro-batches; here with nothing between the segments."""

    def __init__(self, run: Run, tape: Tape) -> None:
        self.run, self.tape = run, tape
        self.num_blocks = len(tape.recorded)

    def step(self, ledger: Ledger) -> None:
        """The micro-batches of an optimizer step; of those between the first and the last, one."""
        count = self.run.batch.gradient_accumulation_steps
        for number in sorted({0, min(1, count - 1), count - 1}):
            self.micro_batch(ledger, first=number == 0, last=number == count - 1)

    def micro_batch(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        """One forward and backward; between two of them ``ledger`` holds what is accumulated."""
        tape = self.tape
        self.begin(ledger, first=first, last=last)
        ledger.play(tape.embed, "embedding")
        for i in range(self.num_blocks):
            self.before_forward(ledger, i)
            ledger.play(tape.forward[tape.recorded[i]], f"forward of layer {i}")
            self.after_forward(ledger, i)
        ledger.play(tape.head, "loss")
        self.before_backward(ledger, None)
        self.play_backward(ledger, tape.head_backward, "backward of the loss")
        for i in reversed(range(self.num_blocks)):
            self.before_backward(ledger, i)
            self.play_backward(ledger, tape.backward[tape.recorded[i]], f"backward of layer {i}")
            self.after_backward(ledger, i)
        self.play_backward(ledger, tape.embed_backward, "backward of the embedding")
        self.end(ledger, first=first, last=last)

    def evaluation(self, ledger: Ledger, tape: Tape) -> None:
        """A forward pass without gradients.

        Args:
            tape: recorded without gradients.
        """
        self.begin(ledger, first=True, last=True)
        ledger.play(tape.embed, "embedding")
        for i in range(self.num_blocks):
            self.before_forward(ledger, i)
            ledger.play(tape.forward[tape.recorded[i]], f"forward of layer {i}")
            self.after_forward(ledger, i)
        ledger.play(tape.head, "loss")

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment, moment)

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        """Before a micro-batch, or an evaluation."""

    def before_forward(self, ledger: Ledger, block: int) -> None:
        """Before a block's forward."""

    def after_forward(self, ledger: Ledger, block: int) -> None:
        """Behind it."""

    def before_backward(self, ledger: Ledger, block: int | None) -> None:
        """Before a block's backward, or that of what is behind all of them."""

    def after_backward(self, ledger: Ledger, block: int) -> None:
        """Behind it."""

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        """When its backward has ended."""


class DdpTimeline(Timeline):
    """Gradients live in DDP's buckets, which are there from the first step on; autograd's own copy of each goes as it
    comes. In micro-batches that do not reduce, gradients are of their own, and move into the buckets with the last."""

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self.reduces = last
        self.accumulates = not first
        if self.run.precision.reduce != self.run.precision.master and last:
            width = DTYPE_BYTES[self.run.precision.reduce] / DTYPE_BYTES[self.run.precision.master]
            ledger.add("communication", int(min(DDP_BUCKET_BYTES, _gradient_bytes(self.run)) * width))

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        if self.reduces and self.accumulates:
            segment = segment.gradients_leave
        elif self.reduces or self.accumulates:
            segment = segment.gradients_move
        ledger.play(segment, moment)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        ledger.now["communication"] = 0


class Fsdp2Timeline(Timeline):
    """``fully_shard``: a unit's shards are gathered into one buffer and copied out of it, gradients are copied into one
    and reduced. In forward the buffer stays until the next unit has its own; in backward the next unit's is filled
    while one runs, and what is reduced stays until the next unit reduces."""

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
        self.kept_gradients = 0  # this rank's chunks
        self.accumulates = False

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self._gather(ledger, self.root)
        self._copy_out(ledger, self.root, "gathering the embedding")
        self.accumulates = not first
        self.kept_gradients = ledger.now["gradients"]

    def before_forward(self, ledger: Ledger, block: int) -> None:
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
        ledger.add("gather_buffers", -unit.whole_bytes)
        whole = self.tape.backward[self.tape.recorded[block]].net["gradients"]
        self._reduce(ledger, unit, whole, f"reducing layer {block}")

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        ledger.add("gather_buffers", -self.root.whole_bytes)
        self._reduce(ledger, self.root, ledger.now["gradients"] - self.kept_gradients, "reducing the embedding")
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
        if self.accumulates:  # the reduced chunk is added to the one that is there
            ledger.touch("gradients", unit.gradient_bytes, moment)
        else:
            ledger.add("gradients", unit.gradient_bytes, moment)
            self.kept_gradients += unit.gradient_bytes


class ZeroTimeline(Timeline):
    """DeepSpeed's optimizers, whose buckets have the size that the file states, or that of all that trains.

    A gradient is copied into a bucket as it comes and goes; with ``overlap_comm`` a second one fills while the first is
    reduced. A bucket is reduced from copies: when it is full, or at the end of backward where it holds all gradients.
    What stage 3 keeps gathered depends on the order of use; the bound is what its knobs allow.
    """

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        run, knobs = self.run, self.run.deepspeed
        assert knobs is not None
        self.gathered = live_bytes(run, knobs) if isinstance(knobs, Zero3Knobs) else 0
        self.copies = reduction_bytes(run)
        self.fills = knobs.reduce_bucket_size < run.model.num_trainable
        self.buckets = bucket_bytes(run) + (self.copies if self.fills else 0)
        ledger.add("gather_buffers", self.gathered)
        ledger.add("communication", self.buckets, "buckets")

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment.gradients_move, moment)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        if not self.fills:
            ledger.touch("communication", self.copies, "reducing")
        ledger.add("gather_buffers", -self.gathered)
        ledger.add("communication", -self.buckets)


class Bf16OptimizerTimeline(Timeline):
    """Stage 1 in bf16: gradients are added to whole fp32 ones and stay until the step ends; the fp32 ones are reduced
    at its end, a bucket at a time, from a flat copy."""

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self.accumulates = not first

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        ledger.play(segment.gradients_move if self.accumulates else segment, moment)

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        if last:
            knobs, model = self.run.deepspeed, self.run.model
            assert knobs is not None
            numel = min(knobs.reduce_bucket_size, model.num_trainable)
            ledger.touch("communication", numel * DTYPE_BYTES["fp32"], "reducing")
            ledger.add("gradients", -model.num_trainable * DTYPE_BYTES["bf16"])


def timeline(run: Run, tape: Tape) -> Timeline:
    """That of the run's strategy."""
    match run.strategy:
        case "ddp":
            return DdpTimeline(run, tape)
        case "fsdp2":
            return Fsdp2Timeline(run, tape)
        case "zero1" if run.precision.compute == "bf16":
            return Bf16OptimizerTimeline(run, tape)
        case _:
            return ZeroTimeline(run, tape)


def live_bytes(run: Run, knobs: Zero3Knobs) -> int:
    """Most that stage 3 has gathered at a time: ``max_live_parameters`` and what was fetched ahead of them, or all; and
    the buffer from which what is fetched last is copied."""
    numels = [p.numel for p in run.model.parameters]
    ahead = knobs.stage3_prefetch_bucket_size
    live = min(sum(numels), knobs.stage3_max_live_parameters + ahead)
    return (live + min(sum(numels), max(ahead, *numels))) * DTYPE_BYTES[run.precision.compute]


def reduction_bytes(run: Run) -> int:
    """Copies of a bucket in ``reduce`` while it is reduced: its cast and what travels, or under stage 3 one."""
    assert run.deepspeed is not None
    numel = min(run.deepspeed.reduce_bucket_size, run.model.num_trainable)
    return (1 if run.strategy == "zero3" else 2) * numel * DTYPE_BYTES[run.precision.reduce]


def bucket_bytes(run: Run) -> int:
    """Of the buffers that gradients are reduced from."""
    knobs = run.deepspeed
    assert knobs is not None
    numel = min(knobs.reduce_bucket_size, run.model.num_trainable)
    if run.strategy == "zero3":
        return numel * DTYPE_BYTES[run.precision.reduce]
    # Gradients wait in their own dtype; what is reduced is cast piece by piece.
    copies = 1 if knobs.overlap_comm is False else 2
    return copies * numel * DTYPE_BYTES[run.precision.compute]


def _gradient_bytes(run: Run) -> int:
    return run.model.num_trainable * DTYPE_BYTES[run.precision.master]


def _unit(run: Run, block: str | None, shards: int) -> Unit:
    members = [p for p in run.model.parameters if p.block == block]
    trained = [p for p in members if p.trainable]

    def padded(parameter: ParameterSpec) -> int:
        rows = -(-parameter.shape[0] // shards) * shards
        return rows * (parameter.numel // parameter.shape[0])

    reduced = sum(map(padded, trained))
    return Unit(
        whole_bytes=sum(map(padded, members)) * DTYPE_BYTES[run.precision.compute],
        reduced_bytes=reduced * DTYPE_BYTES[run.precision.reduce],
        gradient_bytes=reduced // shards * DTYPE_BYTES[run.precision.master],
    )
