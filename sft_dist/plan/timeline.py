"""Plays the tape of a micro-batch; what a strategy puts between its segments is in the modules beside this one.

A ``Timeline`` plays forward and backward of micro-batches; ``plan/memory.py`` puts states, update, evaluation and
saving around it. What is allocated when follows the libraries' own order of events.
"""

from __future__ import annotations

from sft_dist.plan.ledger import Ledger
from sft_dist.plan.tape import Segment, Tape
from sft_dist.run import Run


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
        self._forward(ledger, tape)
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
        self._forward(ledger, tape)

    def _forward(self, ledger: Ledger, tape: Tape) -> None:
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
