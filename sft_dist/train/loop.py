"""The loop: steps, evaluations, checkpoints, and what is written about them."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from rich.markup import escape

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.checkpoint.manifest import Position
from sft_dist.checkpoint.store import name_of
from sft_dist.data.loader import Step, TrainingOrder
from sft_dist.errors import Preempted
from sft_dist.metrics.heartbeat import Heartbeat
from sft_dist.metrics.logger import Metrics, RunLogger
from sft_dist.run import Run
from sft_dist.runtime.memory import keep_freed_memory, peak_memory_gib
from sft_dist.runtime.seeding import seed_step
from sft_dist.runtime.signals import Signals
from sft_dist.runtime.world import World
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.spec import ShardingSpec
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import MovementCheck, verify_sharding
from sft_dist.train.account import Account, TrainedStep
from sft_dist.train.agreement import Agreement
from sft_dist.train.control import Control
from sft_dist.train.evaluations import EvaluationFiles, Evaluations
from sft_dist.train.guard import GoBack, Guard
from sft_dist.train.position import position_after
from sft_dist.train.profile_summary import shown
from sft_dist.train.profiling import Profiling
from sft_dist.train.step import StepOutcome, train_step
from sft_dist.train.stragglers import Forwards, Mark, RankTimes, Stragglers, forward_waits, seconds

# Of the peak learning rate.
LARGE_SHARE = 0.01


@dataclass(frozen=True)
class _Finished:
    """A step whose numbers may still be on the device."""

    number: int
    step: Step
    outcome: StepOutcome
    forwards: list[tuple[Mark, Mark]]
    lr: float
    elapsed_s: float
    is_steady: bool


class Training:
    """One run's loop on one rank.

    Args:
        spec: what this rank holds between steps.
        evaluations: None: nothing is held out.
        logger, account, files: on rank 0; None elsewhere.
        signals: that this process notes.
        heartbeat: gets what it is doing.
        position: of the checkpoint that the run goes on from; None where it begins.
        guard: judges every step.
        profiling: traces some steps.
    """

    def __init__(
        self,
        run: Run,
        world: World,
        device: torch.device,
        strategy: Strategy,
        spec: ShardingSpec,
        order: TrainingOrder,
        evaluations: Evaluations | None,
        logger: RunLogger | None,
        files: EvaluationFiles | None,
        account: Account | None,
        checkpointer: Checkpointer,
        signals: Signals,
        heartbeat: Heartbeat,
        guard: Guard,
        *,
        num_steps: int,
        position: Position | None,
        profiling: Profiling | None = None,
    ) -> None:
        self.run, self.world, self.device, self.strategy, self.spec = run, world, device, strategy, spec
        self.order, self.evaluations, self.files, self.checkpointer = order, evaluations, files, checkpointer
        self.logger, self.account, self.signals, self.heartbeat = logger, account, signals, heartbeat
        self.guard, self.agreement, self.profiling = guard, Agreement(), profiling
        self.num_steps, self.completed = num_steps, 0 if position is None else position.completed_steps
        self.control = Control(run, logger, checkpointer.best(), position)
        self._stragglers = Stragglers(world.rank, self.agreement, forward_waits=forward_waits(run))
        self._forwards = Forwards(strategy.model, device)
        self.ranks: list[RankTimes] = []
        """How fast each rank was, when training has ended; empty where no step was trained."""
        self._trained = 0  # by this process
        self._saved_at = time.monotonic()
        self._unread: _Finished | None = None
        self._is_checked = False  # a step has moved parameters and left nothing gathered

    def train(self) -> None:
        """Trains to the last step.

        Raises:
            Preempted: a signal asked for it, on any rank; a checkpoint is saved.
            TrainingDiverged: a loss or a gradient norm is not finite.
            ShardingMismatch: the first step moved nothing, or left something gathered.
        """
        if self.account is not None:
            self.account.begin_training()
        if self.device.type == "cpu":
            keep_freed_memory()
        try:
            self._all_steps()
        except Exception:
            # What is being written is of an earlier step, and good.
            self.checkpointer.settle()
            self._tell_of_saves()
            raise
        self._tell_profile(is_over=True)
        self._finish_saving()
        self._agree(is_saved=True, anew=True)
        self._forwards.close()
        self.ranks = self._stragglers.of_all()
        if self.account is not None:
            self.account.end_training()

    def _all_steps(self) -> None:
        if self.run.eval.before_training and self.completed == 0:
            self._evaluate()
        if not self._is_over and self.guard.needs_start(self.completed):
            self._save()
        while not self._is_over or self._unread is not None:
            try:
                self._step()
            except GoBack as back:
                self._go_back(back)

    def _step(self) -> None:
        """The next step, or after the last one its numbers."""
        if self._is_over:
            self._read()
            return
        if self.guard.spikes.leaves_out(self.completed + 1):
            self._read()
            self.guard.left_out(self.completed + 1)
        elif self._is_checked:
            with nullcontext() if self.profiling is None else self.profiling.step():
                self._train_step()
            self._tell_profile()
        else:
            self._first_step()
        self._after_step()

    def _go_back(self, back: GoBack) -> None:
        position = self.guard.go_back(back)
        self._unread, self.completed = None, position.completed_steps
        self.control = Control(self.run, self.logger, self.checkpointer.best(), position)
        if self.files is not None:
            self.files.go_back(self.completed)
        self.heartbeat.at(self.completed, self.num_steps)

    @property
    def _is_over(self) -> bool:
        return self.completed == self.num_steps or self.control.stops

    def _tell_profile(self, *, is_over: bool = False) -> None:
        """Writes the trace when all steps are in it, or no more will come."""
        if self.profiling is None or not (self.profiling.is_due or (is_over and self.profiling.has_begun)):
            return
        figures = self.profiling.finish()
        if self.logger is not None:
            self.logger.show(shown(figures))
            self.logger.say(f"trace     {self.profiling.folder}, for ui.perfetto.dev or chrome://tracing")

    def _first_step(self) -> None:
        """A step with its checks: parameters must move, and what a step gathers must be gone when it ends."""
        lr = learning_rate(self.run.optim, self.completed, self.num_steps)
        # At the end of a resumed run an update may be too small to show in a bf16 weight.
        must_move = self.completed == 0 or lr >= LARGE_SHARE * self.run.optim.lr
        check = MovementCheck(self.strategy) if must_move else None
        self._train_step()
        self._read()
        if self.guard.spikes.leaves_out(self.completed + 1):  # its update was not made
            return
        if check is not None:
            check.verify(self.world.rank)
        verify_sharding(self.strategy, self.spec)
        self._is_checked = True

    def _after_step(self) -> None:
        self.completed += 1
        self.control.trained()
        is_evaluated = self._evaluation_is_due()
        if is_evaluated:
            self._evaluate()
        is_saved = self._checkpoint_is_due()
        if is_saved:
            self._save()
        self._tell_of_saves()
        # What came while that lasted need not wait for the next step.
        self._agree(is_saved=is_saved, anew=is_evaluated or is_saved)
        self._trained += 1
        slow = self._stragglers.compared(self._trained)
        if slow is not None and self.logger is not None:
            self.logger.say(f"[yellow]{escape(slow)}")

    def _begin_agreement(self) -> None:
        self.agreement.begin(
            signal=self.signals.noted,
            save_is_due=self._clock_says_so(),
            save_failed=self.checkpointer.has_failed,
        )

    def _agree(self, *, is_saved: bool, anew: bool) -> None:
        """Does what any rank asks all of them to do at the end of a step.

        Args:
            is_saved: whether this step has a checkpoint already.
            anew: by what ranks know now; else by what they knew before the update.
        """
        if anew or not self.agreement.is_begun:
            self._begin_agreement()
        agreed = self.agreement.reached()
        if agreed.save_failed:
            self._finish_saving()
        if (agreed.signal or agreed.save_is_due) and not is_saved:
            self._save()
        if agreed.signal:
            self._leave(signal.Signals(agreed.signal).name)

    def _clock_says_so(self) -> bool:
        """Whether ``checkpoint.every_minutes`` are over, by the clock of rank 0."""
        minutes = self.run.checkpoint.every_minutes
        return minutes is not None and self.world.is_main and time.monotonic() - self._saved_at >= 60 * minutes

    def _leave(self, by: str) -> None:
        self._finish_saving()
        if self.account is not None:
            self.account.preempted(by)
        checkpoint = self.checkpointer.folder / name_of(self.completed)
        # With checkpoint.on_failure: continue, a disk that is full has been told and stops nothing.
        how = f"saved {checkpoint}" if checkpoint.exists() else f"{checkpoint} could not be saved, older ones are there"
        raise Preempted(f"preempted by {by} at step {self.completed}: {how}", fix="go on with --resume auto")

    def _evaluation_is_due(self) -> bool:
        return self._is_due(self.run.eval.every_steps)

    def _checkpoint_is_due(self) -> bool:
        """Every ``checkpoint.every_steps``, after every epoch, at the end, and as the best one so far."""
        at_its_time = self._is_due(self.run.checkpoint.every_steps) or self.completed % self.order.steps_per_epoch == 0
        return at_its_time or self._is_over or self.control.is_best

    def _is_due(self, every: int | None) -> bool:
        return self.completed == self.num_steps or (every is not None and self.completed % every == 0)

    def _save(self) -> None:
        """Begins to save; it goes on beside the steps that follow."""
        # A step that diverged must not become a checkpoint.
        self._read()
        started, self._saved_at = time.perf_counter(), time.monotonic()
        with self.heartbeat.phase("saving"):
            self.checkpointer.save(self.strategy, self._position())
        self.control.saved()
        if self.account is not None:
            self.account.saved(time.perf_counter() - started)

    def _position(self) -> Position:
        position = position_after(self.run, self.order, self.completed, num_steps=self.num_steps)
        trained_s = 0.0 if self.account is None else self.account.trained_s
        measured = {"trained_s": trained_s, **self.control.of_position()}
        return position.model_copy(update=measured | self.guard.spikes.remembered())

    def _finish_saving(self) -> None:
        """Waits for what is being written, and says how it went, also when it went wrong."""
        started = time.perf_counter()
        try:
            with self.heartbeat.phase("saving"):
                self.checkpointer.wait()
        finally:
            self._tell_of_saves()
        if self.account is not None:
            self.account.saved(time.perf_counter() - started)

    def _tell_of_saves(self) -> None:
        if self.logger is None:
            return
        for outcome in self.checkpointer.news():
            if outcome.error is None:
                self.logger.say(f"saved and read back {outcome.checkpoint}, in {outcome.written_s:.1f} s")
            else:
                self.logger.say(f"[yellow]{escape(outcome.error)}; fix: {escape(outcome.fix)}")
            if outcome.notice is not None:
                self.logger.say(f"[yellow]its copy is not complete yet: {escape(outcome.notice)}")

    def _train_step(self) -> None:
        started, number = time.perf_counter(), self.completed
        seed_step(self.run.seed, number, self.world.rank)
        step = self.order.step(number)
        lr = learning_rate(self.run.optim, number, self.num_steps)
        admits = partial(self.guard.spikes.admits, number + 1) if self.guard.spikes.waits else None
        outcome = train_step(
            self.strategy, self.order.data, self.run.batch, step,
            rank=self.world.rank, device=self.device, lr=lr, admits=admits,
            meanwhile=self._begin_agreement,
        )  # fmt: skip
        # Reading the numbers of this step would wait for it; those of the one before have arrived by now. Waiting for
        # them is part of the time of this step: the host runs one step ahead, so the average over steps is right.
        is_steady = self._unread is not None or admits is not None or self.device.type == "cpu"
        self._read()
        forwards = self._forwards.take()
        self._unread = _Finished(number, step, outcome, forwards, lr, time.perf_counter() - started, is_steady)
        if admits is not None:
            self._read()  # what was waited for; the next step is judged by it

    def _read(self) -> None:
        """Reads and reports the step whose numbers were left on the device."""
        if self._unread is None:
            return
        done, self._unread = self._unread, None
        loss, grad_norm = float(done.outcome.loss), float(done.outcome.grad_norm)
        self.heartbeat.completed(done.number + 1)
        self.control.read(loss)
        self._stragglers.add(
            data_wait_s=done.outcome.data_wait_s, forward_s=seconds(done.forwards), step_s=done.elapsed_s
        )
        known_norm = grad_norm if done.outcome.is_admitted else None
        trouble = self.guard.spikes.trouble(done.number + 1, loss, known_norm)
        if self.logger is not None and self.account is not None:
            metrics = self._metrics(done, loss, grad_norm)
            of_account, bill = self.account.trained(
                TrainedStep(
                    number=done.number + 1,
                    sequences=done.step.sequences.tolist(),
                    tokens=done.step.num_tokens,
                    elapsed_s=done.elapsed_s,
                    data_wait_s=done.outcome.data_wait_s,
                    is_steady=done.is_steady,
                )
            )
            if trouble is None or trouble.remedy != "skip":
                self.logger.training_step(metrics | of_account, bill=bill)
        if trouble is not None:
            self.guard.react(trouble, done.step, done.lr, done.outcome)
        if done.outcome.is_applied:
            self.guard.spikes.trained(loss)

    def _metrics(self, done: _Finished, loss: float, grad_norm: float) -> Metrics:
        tokens_per_s = done.step.num_tokens / done.elapsed_s
        return {
            "step": done.number + 1,
            "epoch": (done.number + 1) / self.order.steps_per_epoch,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": done.lr,
            "num_tokens": done.step.num_tokens,
            "supervised_tokens": done.step.supervised_tokens,
            "step_time_s": done.elapsed_s,
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_per_device": tokens_per_s / self.world.size,
            "data_wait_s": done.outcome.data_wait_s,
            "peak_memory_gib": peak_memory_gib(self.device),
        }

    def _evaluate(self) -> None:
        if self.evaluations is None:
            return
        self._read()
        started, step = time.perf_counter(), self.completed
        with self.heartbeat.phase("evaluating"):
            result = self.evaluations.evaluate(self.strategy, step, is_end=step in (0, self.num_steps))
            if self.control.would_stop(step, result.metrics):
                result = self.evaluations.complete(self.strategy, result)
        if self.account is not None:
            self.account.evaluated(time.perf_counter() - started)
        if self.files is not None:
            self.files.write(result)
        self.control.evaluated(step, result.metrics)
