"""What a model answered as it learned: kept over all starts of a run, on a disk that refuses, and by trackers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_dist.evaluation.examiner import Findings, Reply
from sft_dist.metrics.logger import RunLogger
from sft_dist.train.evaluations import Evaluated, EvaluationFiles
from sft_dist.train.samples_file import SamplesFile
from tests.unit.test_logger import OFF, last_run, line, to_wandb


def reply(answer: str) -> Reply:
    return Reply("q\u2028", answer, None, "prompts", "stop")


def row(step: int, answer: str) -> list[int | str | None]:
    return [step, "q\u2028", answer, None]


def evaluated(step: int, answer: str) -> Evaluated:
    metrics = {"eval_loss": 1.0, "eval_perplexity": 2.7}
    return Evaluated(step, metrics, Findings(metrics={}, samples=(reply(answer),), judged=(), scores=None, notes=()))


def answers(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "samples.jsonl").read_bytes().splitlines()
    return [(found["step"], found["answer"]) for found in map(json.loads, lines)]


@pytest.fixture
def refusing(tmp_path: Path) -> Path:
    """A folder whose ``samples.jsonl`` cannot be shortened; what stands in the way is returned."""
    file = SamplesFile(tmp_path, completed=0)
    file.add(0, (reply("a"),))
    with file.path.open("a") as cut:
        cut.write('{"step": 2, "answ\n')  # so that it must be written anew
    file.add(2, (reply("b"),))
    file.add(4, (reply("lost"),))
    obstacle = tmp_path / "samples.jsonl.new"
    obstacle.mkdir()
    return obstacle


def test_rows_are_those_up_to_a_step(tmp_path: Path) -> None:
    file = SamplesFile(tmp_path, completed=0)
    for step in (0, 2, 4):
        file.add(step, (reply(f"at {step}"),))
    assert file.rows(2) == [row(0, "at 0"), row(2, "at 2")]
    file.go_back(0)
    assert file.rows(9) == [row(0, "at 0")]
    assert SamplesFile(tmp_path, completed=0).rows(9) == [], "a run that begins anew"


def test_a_file_that_cannot_be_shortened_gets_no_reply_twice_and_loses_none(tmp_path: Path, refusing: Path) -> None:
    before = (tmp_path / "samples.jsonl").read_bytes()
    file = SamplesFile(tmp_path, completed=2)
    assert file.problem == "Is a directory"
    assert file.rows(9) == [row(0, "a"), row(2, "b")]
    file.add(4, (reply("c"),))
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert file.rows(9) == [row(0, "a"), row(2, "b"), row(4, "c")]
    file.go_back(2)
    assert file.rows(9) == [row(0, "a"), row(2, "b")]
    refusing.rmdir()
    file.add(4, (reply("d"),))
    assert file.problem is None
    assert answers(tmp_path) == [(0, "a"), (2, "b"), (4, "d")]


def test_it_is_told_in_a_line_and_the_run_goes_on(
    tmp_path: Path, refusing: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 2)))
    with RunLogger(tmp_path, OFF, {}, num_steps=6, completed=2) as logger:
        files = EvaluationFiles(tmp_path, logger, completed=2)
        files.write(evaluated(4, "c"))
        refusing.rmdir()
        files.write(evaluated(6, "d"))
    told = [said for said in capsys.readouterr().out.splitlines() if "samples.jsonl" in said]
    assert told == [
        "samples.jsonl cannot be written (Is a directory): training goes on, its lines wait in memory and are written "
        "when it can be",
        "samples.jsonl is written again, and has all lines",
    ]
    assert answers(tmp_path) == [(0, "a"), (2, "b"), (4, "c"), (6, "d")]


def test_the_table_of_a_resumed_run_has_the_rows_of_earlier_starts(tmp_path: Path) -> None:
    """Those of steps that are trained again are in it once; a start without an evaluation has it too."""
    for completed, steps, rows in (
        (0, (1, 2, 3), [row(1, "start 0"), row(2, "start 0"), row(3, "start 0")]),
        (2, (3,), [row(1, "start 0"), row(2, "start 0"), row(3, "start 2")]),
        (2, (), [row(1, "start 0"), row(2, "start 0")]),
    ):
        with RunLogger(tmp_path, to_wandb(), {}, num_steps=4, completed=completed) as logger:
            files = EvaluationFiles(tmp_path, logger, completed=completed)
            for step in steps:
                logger.training_step(line(step))
                files.write(evaluated(step, f"start {completed}"))
        last = last_run(tmp_path)
        assert last.tables["samples"] == (rows[-1][0], rows)
        assert last.steps == list(range(1, int(str(rows[-1][0])) + 1))


def test_the_table_of_a_run_that_goes_back_has_what_stays(tmp_path: Path) -> None:
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=4) as logger:
        files = EvaluationFiles(tmp_path, logger, completed=0)
        for step in (1, 2):
            logger.training_step(line(step))
            files.write(evaluated(step, "first"))
        logger.go_back(1)
        files.go_back(1)
    last = last_run(tmp_path)
    assert last.steps == [1]
    assert last.tables["samples"] == (1, [row(1, "first")])


def test_tensorboard_has_the_table_of_each_evaluation_once(tmp_path: Path) -> None:
    on = OFF.model_copy(update={"tensorboard": True})

    def start(completed: int, *steps: int) -> list[int]:
        with RunLogger(tmp_path, on, {}, num_steps=4, completed=completed) as logger:
            files = EvaluationFiles(tmp_path, logger, completed=completed)
            for step in steps:
                logger.training_step(line(step))
                files.write(evaluated(step, "a"))
        seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return [event.step for event in seen.Tensors("samples/text_summary")]

    assert start(0, 1) == [1]
    assert start(1) == [1]
    shutil.rmtree(tmp_path / "tensorboard")
    assert start(1, 2) == [1, 2], "the folder was deleted: what stays is written again"
