"""What a run does about a step whose loss or gradient went wrong: ``spikes`` of the configuration, carried out.

Every rank has one, sees the same numbers and does the same. Nothing here runs in a step that went well, but for a
comparison on the host; only ``skip`` needs the loss before the update (see ``Spikes.waits``).
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft_dist.checkpoint import store
from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.manifest import Position
from sft_dist.data.loader import Step, TrainingOrder
from sft_dist.errors import TrainingDiverged
from sft_dist.metrics.logger import RunLogger
from sft_dist.run import Run
from sft_dist.runtime.process_group import from_main, gathered
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.culprit import DIVERGED, Culprit, Decode, Seen, culprit_of, described, keep
from sft_dist.train.spikes import Spikes, Trouble
from sft_dist.train.starting_point import newest_valid
from sft_dist.train.step import StepOutcome


class GoBack(Exception):
    """The run is to go back to its last checkpoint and on from there without the step of ``culprit``."""

    def __init__(self, culprit: Culprit, kept: str) -> None:
        super().__init__(str(culprit.trouble))
        self.culprit, self.kept = culprit, kept


class Guard:
    """Made by all ranks at the same place of the program; needs the process group.

    Args:
        logger: on rank 0; None elsewhere.
        decode: text of token ids.
        position: where the run begins or goes on.
    """

    def __init__(
        self,
        run: Run,
        order: TrainingOrder,
        strategy: Strategy,
        checkpointer: Checkpointer,
        logger: RunLogger | None,
        decode: Decode,
        position: Position,
    ) -> None:
        self.run, self.order, self.strategy, self.checkpointer = run, order, strategy, checkpointer
        self.logger, self.decode = logger, decode
        self.spikes = Spikes(run.spikes, position)
        self._named = ("", 0)  # rows that were said last, and of which step
        # Of its own, so that what it sends is no part of the collectives of training, nor of a save in flight.
        self._group = dist.new_group(backend="gloo")

    def needs_start(self, completed: int) -> bool:
        """Whether a checkpoint is to be saved before the first step, to have one to go back to."""
        if not self.spikes.may_go_back:
            return False
        return not from_main((self.checkpointer.folder / store.name_of(completed)).exists(), self._group)

    def react(self, trouble: Trouble, step: Step, lr: float, outcome: StepOutcome) -> None:
        """Does what ``trouble`` asks for, when the numbers of its step have been read.

        Raises:
            GoBack: the run is to go back.
            TrainingDiverged: it is to end.
        """
        by_parameter = outcome.by_parameter
        own = Seen(
            [float(loss) for loss in outcome.loss_sums],
            [] if by_parameter is None else by_parameter.non_finite(),
            socket.gethostname(),
        )
        data = self.order.data
        culprit = culprit_of(trouble, data, self.run.batch, step, lr, gathered(own, self._group))
        if trouble.remedy == "warn":
            self._tell(culprit, "", event=trouble.kind, step=trouble.step)
            return
        kept = self._kept(culprit)
        if trouble.remedy == "stop":
            self._note(culprit, event=trouble.kind, step=trouble.step)  # the error tells it
            where = from_main(described(culprit, data) if self.logger is not None else "", self._group)
            why = f"; {trouble.why}" if trouble.why else ""
            raise TrainingDiverged(
                f"step {trouble.step}: {trouble}, {where}{why}; {kept}", fix=trouble.fix
            ).everywhere()
        self.spikes.leave_out(trouble.step)
        if trouble.remedy == "roll_back":
            raise GoBack(culprit, kept)
        assert not outcome.is_applied, "the update of a step that is skipped was made"
        self._tell(culprit, kept, event="skipped", step=trouble.step)

    def _kept(self, culprit: Culprit) -> str:
        """Saves the batch, and returns what is said of it: when all of it is done, because a launcher may end rank 0
        as soon as another rank has ended."""
        said = ""
        if self.logger is not None:
            folder = Path(self.run.output_dir) / DIVERGED
            try:
                said = f"its batch is in {keep(culprit, self.order.data, self.decode, folder)}{os.sep}"
            except OSError as error:
                said = f"its batch cannot be written to {folder} ({error.strerror or error})"
        return from_main(said, self._group)

    def _tell(self, culprit: Culprit, kept: str, *, event: str, step: int) -> None:
        """Notes an event and says it; rows that were named for the event before it are not listed again."""
        if self.logger is None:
            return
        trouble, where = culprit.trouble, described(culprit, self.order.data)
        if where == self._named[0]:
            where = f"as at step {self._named[1]}"
        else:
            self._named = (where, trouble.step)
        done = {"skipped": "; its update was not made", "rolled_back": f"; back at step {step}"}.get(event, "")
        told = f"step {trouble.step}: {trouble}, {where}{done}"
        self._note(culprit, event=event, step=step, told=told + (f"; {kept}" if kept else ""))

    def _note(self, culprit: Culprit, *, event: str, step: int, told: str = "") -> None:
        """
        Args:
            told: for people; empty: it is only written.
        """
        if self.logger is None:
            return
        trouble = culprit.trouble
        line: dict[str, Any] = {"step": step, "event": event, "because": trouble.kind, "of_step": trouble.step}
        line |= {"ranks": culprit.ranks, "of_loss": trouble.loss}
        known = {"of_grad_norm": trouble.grad_norm, "median_loss": trouble.median}
        line |= {name: value for name, value in known.items() if value is not None}
        self.logger.event(line, told)

    def left_out(self, step: int) -> None:
        """The run comes by a step that it trains without."""
        if self.logger is not None:
            self.logger.event({"step": step, "event": "skipped", "because": "rolled_back", "of_step": step}, "")

    def go_back(self, back: GoBack) -> Position:
        """Puts the state of the newest checkpoint back, in this process; where the run is then.

        Raises:
            TrainingDiverged: there is none.
            CheckpointError: none is as it was written, or a save in flight failed so that training must not go on.
        """
        self.checkpointer.wait()
        folder = self.checkpointer.folder
        there = from_main([path.name for path in store.complete_checkpoints(folder)], self._group)
        checkpoint = newest_valid([folder / name for name in reversed(there)], own=folder)
        if checkpoint is None:
            trouble = back.culprit.trouble
            what = f"step {trouble.step}: {trouble}; there is no checkpoint to go back to; {back.kept}"
            key = "spikes.policy" if trouble.kind == "spike" else "spikes.non_finite"
            fix = f"look at these rows; lower optim.lr, or set {key} to skip, which needs no checkpoint"
            raise TrainingDiverged(what, fix=fix).everywhere()
        position = self.checkpointer.load(checkpoint, self.strategy).position
        self.spikes.went_back(position)
        if self.logger is not None:
            self.logger.go_back(position.completed_steps)
        self._tell(back.culprit, back.kept, event="rolled_back", step=position.completed_steps)
        return position
