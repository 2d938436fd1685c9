"""What DeepSpeed's optimizers take during a step (``stage_1_and_2.py``, ``stage3.py``, ``bf16_optimizer.py``)."""

from __future__ import annotations

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment
from sft_dist.plan.timeline import Timeline
from sft_dist.run import Run


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
