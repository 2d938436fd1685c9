"""``train --rehearse``: what a run will do, each once and at full size, in minutes, before it starts.

The rehearsal runs in the run's own processes on the run's own model, with its own functions. It begins with a
checkpoint of the state that the run starts from and ends by reading it back, so that what follows has the bits that it
would have had without. Nothing of it stays but what it printed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist

from sft_dist.checkpoint.checkpointer import Checkpointer
from sft_dist.errors import PlanError, SftError
from sft_dist.plan.units import gib
from sft_dist.runtime.memory import peak_memory_gib
from sft_dist.runtime.process_group import from_main, gathered
from sft_dist.train.hardest import hardest_steps
from sft_dist.train.rehearsal_items import Items, Stage, Trained
from sft_dist.train.rehearsal_report import Item, Measured, Report, Saving, due
from sft_dist.train.rehearsed import FOLDER, note_rehearsed
from sft_dist.train.rehearsed_answers import hardest_questions


def rehearse(stage: Stage) -> float:
    """Rehearses a run and puts its state back; every rank calls it. Seconds that it took.

    Raises:
        PlanError: a device has too little memory.
        CheckpointError: what was saved or exported is not what was trained, or the disk has too little room.
        TrainingDiverged: a loss is not finite.
        ShardingMismatch: a step moved nothing, or left something gathered.
    """
    started, folder = time.perf_counter(), Path(stage.run.output_dir) / FOLDER
    # Two more than are ever there: none may go, and none may fail.
    rules = stage.run.checkpoint.model_copy(
        update={"keep_last": 4, "keep_every_hours": None, "keep_best": False, "on_failure": "stop", "mirror": None}
    )
    of_run = stage.checkpointer
    checkpointer = Checkpointer(
        folder,
        rules=rules,
        identity=of_run.identity,
        strategy_name=of_run.strategy_name,
        settings=of_run.settings,
    )
    try:
        with _random_numbers_kept(stage.device):
            _Rehearsal(stage, checkpointer, folder).all_items(started)
    except SftError:
        # A thread that still writes would make the folder again. What went wrong first is told, not what followed.
        with suppress(SftError, RuntimeError):
            checkpointer.wait()
        raise
    else:
        checkpointer.close()
    finally:
        # Any rank that fails: the others may wait for it, and be ended.
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    note_rehearsed()
    return time.perf_counter() - started


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


# What the item is called in which questions are answered.
ANSWERS = "answers"


class _Rehearsal:
    """The items, in their order."""

    def __init__(self, stage: Stage, checkpointer: Checkpointer, folder: Path) -> None:
        self.stage, self.run = stage, stage.run
        self.report = Report(is_main=stage.world.is_main)
        planned = None
        if stage.outlook is not None and stage.outlook.expected is not None:
            planned = stage.outlook.expected.peak_allocated_bytes
        self.planned_peak_bytes: int | None = from_main(planned)
        self.peak_bytes = 0
        self.items = Items(stage, checkpointer, folder, planned_peak_bytes=self.planned_peak_bytes)

    def all_items(self, started: float) -> None:
        stage = self.stage
        self.report.begin(self.run, completed=stage.completed, num_steps=stage.num_steps)
        with self._item("room on the disk") as item:
            item.result = self.items.room()
        with self._item("save the start") as item:
            start, before, item.result = self.items.save_start()
        hard_steps = hardest_steps(stage.order, first=stage.completed, last=stage.num_steps)
        for number, hard in enumerate(hard_steps):
            with self._item("longest row" if number else "longest batch") as item:
                item.result = self.items.hard_step(hard, is_first=number == 0)
        evaluation_s = answers_s = None
        if stage.eval_data is not None:
            with self._item("evaluation") as item:
                evaluation_s, item.result = self.items.evaluate(stage.eval_data)
            questions = hardest_questions(self.run, stage.eval_data, stage.world.size)
            if questions is not None:
                with self._item(ANSWERS) as item:
                    answers_s, item.result = self.items.answers(questions)
        with self._item("save beside a step") as item:
            saved, beside, item.result = self.items.save_beside_a_step()
        with self._item("reload") as item:
            item.result = self.items.reload(saved)
        with self._item("resume") as item:
            alone, item.result = self.items.resume(saved, beside)
        final_started = time.perf_counter()
        with self._item("export and proof" if self.run.checkpoint.prove_final else "export") as item:
            item.result = self.items.export()
        final_s = time.perf_counter() - final_started
        with self._item("back to the start") as item:
            item.result = self.items.restore(start, before)
        if stage.outlook is not None:
            found = self._measured(beside, alone, evaluation_s, answers_s, saved.saving, final_s)
            self.report.end(self.run, found, stage.outlook, seconds=time.perf_counter() - started)

    @contextmanager
    def _item(self, name: str) -> Iterator[Item]:
        """One item: its line when it passes, its name before what went wrong when it does not."""
        device = self.stage.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            with self.report.running(name) as item:
                yield item
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                item.peak_bytes = max(gathered(int(peak_memory_gib(device) * 2**30)))
                self.peak_bytes = max(self.peak_bytes, item.peak_bytes)
        except torch.OutOfMemoryError as error:
            raise self._does_not_fit(name, error) from error
        except SftError as error:
            named = type(error)(f"rehearsal, {name}: {error.what}", fix=error.fix)
            named.on_all_ranks = error.on_all_ranks
            raise named from error

    def _does_not_fit(self, name: str, error: torch.OutOfMemoryError) -> PlanError:
        planned = "" if self.planned_peak_bytes is None else f"; {gib(self.planned_peak_bytes)} were planned"
        ways = []
        if name == ANSWERS:
            ways.append(f"lower eval.answers.rows_at_once (now {self.run.eval.answers.rows_at_once})")
        if self.run.batch.micro_batch_size > 1:
            ways.append(f"lower train.micro_batch_size (now {self.run.batch.micro_batch_size})")
        if self.run.activation_checkpointing.mode != "full":
            ways.append(f"set activation_checkpointing.mode to full (now {self.run.activation_checkpointing.mode})")
        ways.append(f"lower data.max_seq_len (now {self.run.data.max_seq_len:,})")
        return PlanError(
            f"rehearsal, {name}: rank {self.stage.world.rank} ran out of device memory{planned}: "
            + str(error).splitlines()[0],
            fix=f"{', or '.join(ways)}; `sft-dist plan` says what each saves; and see what else uses the GPU",
        )

    def _measured(
        self,
        beside: Trained,
        alone: Trained,
        evaluation_s: float | None,
        answers_s: float | None,
        saving: Saving,
        final_s: float,
    ) -> Measured:
        stage, run = self.stage, self.run
        data, steps = stage.order.data, stage.num_steps - stage.completed
        span = {"first": stage.completed, "last": stage.num_steps}
        before = run.eval.before_training and stage.completed == 0
        evaluations = 0 if evaluation_s is None else before + due(run.eval.every_steps, 0, **span)
        at_ends = min(evaluations, 1 + before)
        return Measured(
            step_s=alone.seconds,
            step_tokens=stage.order.step(stage.completed).num_tokens,
            beside_s=beside.seconds,
            tokens=steps / stage.order.steps_per_epoch * int(data.num_tokens.sum()),
            steps=steps,
            evaluations=evaluations,
            saves=due(run.checkpoint.every_steps, stage.order.steps_per_epoch, **span),
            evaluation_s=evaluation_s,
            saving=saving,
            final_s=final_s,
            peak_bytes=self.peak_bytes if stage.device.type == "cuda" else None,
            answers_s=answers_s,
            times_answered=evaluations if run.eval.answers.when == "always" else at_ends,
        )
