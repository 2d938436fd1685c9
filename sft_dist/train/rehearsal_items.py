"""What a rehearsal does, each thing once and with the run's own functions. Every rank calls the same items."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.filesize import decimal

from sft_dist.checkpoint.checkpointer import Checkpointer, Outcome
from sft_dist.checkpoint.manifest import Position
from sft_dist.data.loader import Step, TrainingOrder
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import CheckpointError, TrainingDiverged
from sft_dist.plan.data import counted_plan
from sft_dist.plan.disk import disk_bytes
from sft_dist.plan.units import gib, step_seconds
from sft_dist.run import Run
from sft_dist.runtime.memory import release_freed_memory
from sft_dist.runtime.process_group import from_main, gathered
from sft_dist.runtime.seeding import seed_step
from sft_dist.runtime.world import World
from sft_dist.sharding.optim import learning_rate
from sft_dist.sharding.spec import ShardingSpec
from sft_dist.sharding.strategy import Strategy
from sft_dist.sharding.verify import MovementCheck, verify_sharding
from sft_dist.train.hardest import HardStep, hardest_evaluation
from sft_dist.train.loop import LARGE_SHARE
from sft_dist.train.outlook import Outlook
from sft_dist.train.rehearsal_report import Saving
from sft_dist.train.rehearsed_answers import HardQuestions, answer_hardest
from sft_dist.train.starting_point import damage
from sft_dist.train.state_digests import state_digests
from sft_dist.train.step import evaluate, train_step

# A GPU may add up in another order each time. Where two replays of a step differ, this much is theirs.
REPLAY_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Stage:
    """What a rehearsal uses of a run that is about to start.

    Args:
        spec: what this rank holds between steps.
        eval_data: held-out rows, or None.
        checkpointer: of the run.
        outlook: on rank 0; None elsewhere.
        write_final: exports and proves an artefact; every rank calls it.
        position: of the state.
    """

    run: Run
    world: World
    device: torch.device
    strategy: Strategy
    spec: ShardingSpec
    order: TrainingOrder
    eval_data: PreparedData | None
    checkpointer: Checkpointer
    outlook: Outlook | None
    write_final: Callable[[Path], object]
    num_steps: int
    position: Position

    @property
    def completed(self) -> int:
        """Steps behind the state."""
        return self.position.completed_steps


@dataclass(frozen=True)
class Trained:
    """A step that was trained: its loss, its gradient norm, and the seconds until the device had done it."""

    loss: float
    grad_norm: float
    seconds: float

    def same_bits(self, other: Trained) -> bool:
        return (self.loss, self.grad_norm) == (other.loss, other.grad_norm)

    def is_near(self, other: Trained) -> bool:
        return math.isclose(self.loss, other.loss, rel_tol=REPLAY_TOLERANCE) and math.isclose(
            self.grad_norm, other.grad_norm, rel_tol=REPLAY_TOLERANCE
        )

    def __str__(self) -> str:
        return f"loss {self.loss!r} and gradient norm {self.grad_norm!r}"


@dataclass(frozen=True)
class Saved:
    """A checkpoint, digests of the state that it was made of, and what it took."""

    checkpoint: Path
    digests: dict[str, str]
    saving: Saving


class Items:
    """The items of a rehearsal. Each says what came out, in words, behind what the next ones need of it.

    Args:
        checkpointer: of the rehearsal's own ``folder``.
        planned_peak_bytes: of a device's memory; None where it was not planned.
    """

    def __init__(
        self, stage: Stage, checkpointer: Checkpointer, folder: Path, *, planned_peak_bytes: int | None
    ) -> None:
        self.stage, self.checkpointer, self.folder = stage, checkpointer, folder
        self.run, self.strategy = stage.run, stage.strategy
        self.planned_peak_bytes = planned_peak_bytes
        self.trained = 0  # optimizer steps since the state that the run starts from

    def room(self) -> str:
        """Compares what the run keeps with what the disk has."""
        needs, enough = from_main(self._needs_of_disk() if self.stage.world.is_main else ("", False))
        if enough:
            return f"the run will need {needs}"
        fewer = f", or lower checkpoint.keep_last (now {self.run.checkpoint.keep_last})"
        raise CheckpointError(
            f"the disk of {self.run.output_dir} has too little room: the run will need {needs}",
            fix=f"make room, or set another output_dir{fewer if self.run.checkpoint.keep_last > 1 else ''}",
        ).everywhere()

    def _needs_of_disk(self) -> tuple[str, bool]:
        """What the run will still write, for people, and whether that is there."""
        data = counted_plan(self.run, self.stage.order.data, self.stage.eval_data, source="counted by the run")
        outlook = self.stage.outlook
        expected = None if outlook is None else outlook.expected
        planned = disk_bytes(self.run, data, total_s=None if expected is None else expected.total_s)
        checkpoints = max(0, planned["checkpoints"] - folder_bytes(self.stage.checkpointer.folder))
        free = shutil.disk_usage(self.run.output_dir).free
        needs = f"{decimal(checkpoints)} for checkpoints and {decimal(planned['final'])} for final/"
        return f"{needs}; {decimal(free)} are free", checkpoints + planned["final"] <= free

    def save_start(self) -> tuple[Path, dict[str, str], str]:
        """The checkpoint, digests of what is in it, and what is said."""
        self.checkpointer.save(self.strategy, self.stage.position)
        before = state_digests(self.strategy)
        outcome = self._ended()
        size = folder_bytes(outcome.checkpoint)
        return outcome.checkpoint, before, f"{decimal(size)} written and read back in {step_seconds(outcome.written_s)}"

    def _ended(self) -> Outcome:
        """Of the save in flight.

        Raises:
            CheckpointError: it failed.
        """
        self.checkpointer.wait()
        (outcome,) = self.checkpointer.news()
        return outcome

    def hard_step(self, hard: HardStep, *, is_first: bool) -> str:
        """Trains the step that is hardest for memory; the first one has to move parameters."""
        stage, lr = self.stage, self._lr()
        must_move = is_first and (stage.completed == 0 or lr >= LARGE_SHARE * self.run.optim.lr)
        check = MovementCheck(self.strategy) if must_move else None
        done = self._train(hard.step)
        if check is not None:
            check.verify(stage.world.rank)
        verify_sharding(self.strategy, stage.spec)
        self.trained += 1
        sharers = "" if self.run.batch.sequence_parallel == 1 else f" of {self.run.batch.sequence_parallel} ranks"
        what = f"step {hard.number + 1:,} has a micro-batch{sharers} of {hard.tokens:,} tokens"
        return f"{what}, its longest row {hard.longest_row:,}; loss {done.loss:.4f}{self._device_memory()}"

    def _device_memory(self) -> str:
        device = self.stage.device
        if device.type != "cuda":
            return ""
        planned = "" if self.planned_peak_bytes is None else f", {gib(self.planned_peak_bytes)} planned"
        return f"; device of {gib(torch.cuda.get_device_properties(device).total_memory)}{planned}"

    def _lr(self) -> float:
        return learning_rate(self.run.optim, self.stage.completed, self.stage.num_steps)

    def _train(self, step: Step) -> Trained:
        """Trains a step as the run's next one: with its learning rate and its random numbers."""
        stage, started = self.stage, time.perf_counter()
        seed_step(self.run.seed, stage.completed, stage.world.rank)
        outcome = train_step(
            self.strategy, stage.order.data, self.run.batch, step,
            rank=stage.world.rank, device=stage.device, lr=self._lr(),
        )  # fmt: skip
        loss, grad_norm = float(outcome.loss), float(outcome.grad_norm)
        if stage.device.type == "cuda":
            torch.cuda.synchronize(stage.device)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise TrainingDiverged(
                f"loss {loss}, gradient norm {grad_norm}",
                fix="lower optim.lr or set optim.max_grad_norm; the sequences of the step were "
                + ", ".join(str(s) for s in step.sequences[:8].tolist()),
            ).everywhere()
        return Trained(loss, grad_norm, time.perf_counter() - started)

    def evaluate(self, data: PreparedData) -> tuple[float, str]:
        """Seconds of a whole evaluation, estimated, and what is said."""
        hard = hardest_evaluation(data, self.run.batch)
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            result = evaluate(
                self.strategy, hard.data, self.run.batch, rank=self.stage.world.rank, device=self.stage.device
            )
            seconds = time.perf_counter() - started
        if not math.isfinite(result.loss):
            raise TrainingDiverged(f"evaluation loss {result.loss}", fix="look at data.eval").everywhere()
        whole_s = seconds * hard.all_tokens / hard.tokens
        said = f"the longest micro-batch of each source, up to {hard.largest:,} tokens; loss {result.loss:.4f}"
        return whole_s, f"{said}; all of it will take about {step_seconds(whole_s)}"

    def answers(self, hard: HardQuestions) -> tuple[float, str]:
        """Seconds of all answers of an evaluation at most, and what is said."""
        seconds, said = answer_hardest(self.run, self.strategy, hard, world=self.stage.world, device=self.stage.device)
        return seconds, f"{said}; all of an evaluation will take at most about {step_seconds(seconds)}"

    def save_beside_a_step(self) -> tuple[Saved, Trained, str]:
        """Saves as the run will, while its next step is trained."""
        expected = state_digests(self.strategy)
        started = time.perf_counter()
        self.checkpointer.save(
            self.strategy,
            self.stage.position.model_copy(update={"completed_steps": self.stage.completed + self.trained}),
        )
        blocked_s = time.perf_counter() - started
        beside = self._train(self.stage.order.step(self.stage.completed))
        outcome = self._ended()
        # By the rank that took longest.
        blocked_s, written_s = (max(gathered(seconds)) for seconds in (blocked_s, outcome.written_s))
        saving = Saving(from_main(folder_bytes(outcome.checkpoint)), blocked_s, written_s)
        how = "asynchronously" if self.run.checkpoint.asynchronous else "while training waits"
        return (
            Saved(outcome.checkpoint, expected, saving),
            beside,
            f"{decimal(saving.num_bytes)} {how}: training waited {step_seconds(blocked_s)}, written and proven in "
            f"{step_seconds(written_s)}, {decimal(round(saving.bytes_per_s))}/s",
        )

    def reload(self, saved: Saved) -> str:
        """Reads what was saved as a resumed run does: all bytes against their digests, then into the state."""
        self._load(saved.checkpoint)
        self._compare(saved.digests, "is not what was saved")
        return f"{len(saved.digests):,} tensors on rank 0, each the bits that were saved"

    def _load(self, checkpoint: Path) -> None:
        problems = damage(checkpoint)
        if problems:
            raise CheckpointError(f"{checkpoint}: {problems[0]}", fix="see what is wrong with the disk").everywhere()
        self.checkpointer.load(checkpoint, self.strategy)

    def _compare(self, expected: Mapping[str, str], what: str) -> None:
        """
        Raises:
            CheckpointError: the state of some rank is not the expected one.
        """
        now = state_digests(self.strategy)
        differing = [name for name in expected.keys() | now.keys() if expected.get(name) != now.get(name)]
        by_rank = gathered(sorted(differing))
        found = [
            f"{len(names):,} tensors of rank {rank}, {names[0]} first" for rank, names in enumerate(by_rank) if names
        ]
        if found:
            raise CheckpointError(
                f"the state {what}: {'; '.join(found[:3])}",
                fix="nothing was trained; start without --rehearse only if you can do without resuming, and please "
                "report this",
            ).everywhere()

    def resume(self, saved: Saved, before: Trained) -> tuple[Trained, str]:
        """Trains the step again that was trained beside the save: a resumed run must do what it would have done."""
        step = self.stage.order.step(self.stage.completed)
        again = self._train(step)
        if again.same_bits(before):
            return again, f"the next step once more: loss {again.loss:.4f} and gradient norm, the same bits"
        self._load(saved.checkpoint)
        third = self._train(step)
        # On a CPU, and where two replays agree, the difference is the checkpoint's.
        if self.stage.device.type == "cpu" or third.same_bits(again) or not again.is_near(before):
            self._resumed_otherwise(before, again)
        apart = max(abs(a - b) / abs(b) for a, b in ((again.loss, third.loss), (again.grad_norm, third.grad_norm)))
        return again, (
            f"the next step once more: loss {again.loss:.4f}; the state is the same bits, but this GPU adds up in "
            f"another order each time: two replays differ by {apart:.1e}"
        )

    def _resumed_otherwise(self, before: Trained, again: Trained) -> NoReturn:
        raise CheckpointError(
            f"the step after a resumption has {again}, without it {before}",
            fix="a resumed run would not be the uninterrupted one; please report this",
        ).everywhere()

    def export(self) -> str:
        """Writes and proves ``final/`` as the run will in its end."""
        final = self.folder / "final"
        self.stage.write_final(final)
        size = from_main(folder_bytes(final))
        proven = ", loaded and compared in a fresh process" if self.run.checkpoint.prove_final else ", not proven"
        return f"{decimal(size)}{proven}"

    def restore(self, start: Path, before: Mapping[str, str]) -> str:
        """Puts back the state that the run starts from."""
        self._load(start)
        self._compare(before, "that the run was to start from did not come back")
        verify_sharding(self.strategy, self.stage.spec)
        if self.stage.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.stage.device)
        release_freed_memory()
        return "the same bits as before"


def folder_bytes(folder: Path) -> int:
    """Of all files in it, at any depth; 0 where there is no folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
