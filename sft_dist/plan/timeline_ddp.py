"""What DDP's reducer takes during a step."""

from __future__ import annotations

from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment, Tape
from sft_dist.plan.timeline import Timeline
from sft_dist.run import Run
from sft_dist.sharding.ddp import has_reducer

# DDP's default bucket_cap_mb.
DDP_BUCKET_BYTES = 25 * 2**20


class DdpTimeline(Timeline):
    """Gradients live in DDP's buckets, which are there from the first step on; autograd's own copy of each goes as it
    comes. In micro-batches that do not reduce, gradients are of their own, and move into the buckets with the last.

    Those of a single rank come with the backward of each step and go with its update."""

    def begin(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        self.reduces = last and has_reducer(self.run)
        self.accumulates = not first
        if self.run.precision.reduce != self.run.precision.master and self.reduces:
            width = DTYPE_BYTES[self.run.precision.reduce] / DTYPE_BYTES[self.run.precision.master]
            ledger.add("communication", int(min(DDP_BUCKET_BYTES, _gradient_bytes(self.run)) * width))

    def play_backward(self, ledger: Ledger, segment: Segment, moment: str) -> None:
        if self.reduces and self.accumulates:
            segment = segment.gradients_leave
        elif self.reduces or self.accumulates:
            segment = segment.gradients_move
        ledger.play(segment, moment)

    def evaluation(self, ledger: Ledger, tape: Tape) -> None:
        self._forward(ledger, tape)  # without DDP around the model

    def end(self, ledger: Ledger, *, first: bool, last: bool) -> None:
        ledger.now["communication"] = 0


def _gradient_bytes(run: Run) -> int:
    return run.model.num_trainable * DTYPE_BYTES[run.precision.master]
