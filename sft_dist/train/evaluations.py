"""The evaluations of a run: their figures, and what they leave in the run directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.markup import escape

from sft_dist.config.schema import Config
from sft_dist.data.prepared import PreparedData
from sft_dist.evaluation.examiner import Examiner, Findings
from sft_dist.evaluation.prompt import prompter_of
from sft_dist.metrics.logger import Metrics, RunLogger
from sft_dist.metrics.tracker import Table
from sft_dist.run import Run
from sft_dist.sharding.strategy import Strategy
from sft_dist.train.ready import Inputs, Process
from sft_dist.train.samples_file import COLUMNS, SAMPLES, SamplesFile
from sft_dist.train.step import evaluate

# In the run directory: the replies that scores are of, a file for each evaluation.
ANSWERS = "answers"


@dataclass(frozen=True)
class Evaluated:
    """
    Args:
        step: completed ones.
        metrics: by the names of ``metrics.jsonl``, the same on all ranks.
        findings: of what is asked beside the loss; None: nothing is.
        is_complete: all of it has been asked.
    """

    step: int
    metrics: Metrics
    findings: Findings | None
    is_complete: bool = True


class Evaluations:
    """Of one run, on one rank.

    Args:
        data: held-out rows.
        examiner: what else is asked; None: the loss is all.
    """

    def __init__(
        self, run: Run, data: PreparedData, examiner: Examiner | None, *, rank: int, device: torch.device
    ) -> None:
        self._run, self._data, self._examiner = run, data, examiner
        self._rank, self._device = rank, device

    def evaluate(self, strategy: Strategy, step: int, *, is_end: bool) -> Evaluated:
        """Every rank must call it.

        Args:
            step: completed steps.
            is_end: before training, or after its last step as planned.
        """
        result = evaluate(strategy, self._data, self._run.batch, rank=self._rank, device=self._device)
        metrics: Metrics = dict(result.metrics)
        if self._examiner is None:
            return Evaluated(step, metrics, None)
        findings = self._examiner.examine(strategy, is_end=is_end)
        is_complete = self._examiner.answers_at(is_end=is_end)
        return Evaluated(step, metrics | findings.metrics, findings, is_complete)

    def complete(self, strategy: Strategy, evaluated: Evaluated) -> Evaluated:
        """Asks what is left, of the same state, because it turned out to be the last; every rank must call it."""
        if evaluated.is_complete:
            return evaluated
        assert self._examiner is not None, "something is left to ask"
        assert evaluated.findings is not None, "something is left to ask"
        findings = self._examiner.answer(strategy, evaluated.findings)
        return Evaluated(evaluated.step, evaluated.metrics | findings.metrics, findings)


class EvaluationFiles:
    """Rank 0's: where evaluations are told and written. A file that cannot be written ends no run.

    Args:
        folder: the run directory.
        completed: steps behind a resumed run; what an earlier process wrote about later ones is removed.
    """

    def __init__(self, folder: Path, logger: RunLogger, *, completed: int) -> None:
        self._folder, self._logger = folder, logger
        self._samples, self._had_problem = SamplesFile(folder, completed=completed), False
        self._tell_of_samples()
        self._show_earlier(completed)

    def write(self, evaluated: Evaluated) -> None:
        """Tells an evaluation, and keeps its replies."""
        findings, step = evaluated.findings, evaluated.step
        if findings is not None:
            if findings.samples:
                self._samples.add(step, findings.samples)
                self._tell_of_samples()
                self._logger.table(Table("samples", COLUMNS, partial(self._samples.rows, step), step))
            try:
                self._write_answers(findings, step)
            except OSError as error:
                self._logger.say(f"[yellow]answers at step {step} could not be written: {error.strerror or error}")
        self._logger.evaluation({"step": step, **evaluated.metrics})
        for note in () if findings is None else findings.notes:
            self._logger.say(f"  {escape(note)}")

    def go_back(self, completed: int) -> None:
        """Removes what was sampled behind the first ``completed`` steps: they are trained again."""
        self._samples.go_back(completed)
        self._tell_of_samples()
        self._show_earlier(completed)

    def _show_earlier(self, completed: int) -> None:
        """The table of steps that stay, which trackers may have lost."""
        try:
            steps = [row[0] for row in self._samples.rows(completed)]
        except OSError:  # told already: it could not be shortened either
            return
        if steps:
            rows = partial(self._samples.rows, steps[-1])
            self._logger.table(Table("samples", COLUMNS, rows, steps[-1], is_known=True))

    def _tell_of_samples(self) -> None:
        had, self._had_problem = self._had_problem, self._samples.problem is not None
        if self._had_problem and not had:
            self._logger.say(
                f"[yellow]{SAMPLES} cannot be written ({self._samples.problem}): training goes on, its lines wait in "
                "memory and are written when it can be"
            )
        elif had and not self._had_problem:
            self._logger.say(f"{SAMPLES} is written again, and has all lines")

    def _write_answers(self, findings: Findings, step: int) -> None:
        if findings.scores is None:
            return
        folder = self._folder / ANSWERS
        folder.mkdir(exist_ok=True)
        per_example = findings.scores.per_example
        with (folder / f"step-{step:08d}.jsonl").open("w", encoding="utf-8") as file:
            for number, reply in enumerate(findings.judged):
                scores = {name: values[number] for name, values in per_example.items()}
                file.write(json.dumps(asdict(reply) | {"scores": scores}, ensure_ascii=False) + "\n")


def evaluations_of(
    run: Run, config: Config, process: Process, inputs: Inputs, *, say: Callable[[str], None]
) -> Evaluations | None:
    """What a run is asked at an evaluation; None where no rows are held out. Every rank must call it.

    Args:
        say: gets notes, on rank 0.

    Raises:
        ConfigError, DataError: as ``Examiner``.
    """
    if inputs.eval_data is None:
        return None
    asked, tokenizer, examiner = run.eval, inputs.renderer.tokenizer, None
    if asked.scores is not None or asked.samples is not None or asked.long_texts is not None:
        examiner = Examiner(
            asked, inputs.eval_data, tokenizer, prompter_of(tokenizer, config), max_seq_len=run.data.max_seq_len,
            seed=run.seed, rank=process.world.rank, world_size=process.world.size, device=process.device,
            say=say,
        )  # fmt: skip
    return Evaluations(run, inputs.eval_data, examiner, rank=process.world.rank, device=process.device)
