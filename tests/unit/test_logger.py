"""Where the numbers of a run come out, and that W&B can take none of them away."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sft_dist.config.schema import LoggingConfig, WandbConfig
from sft_dist.errors import ConfigError, Preempted
from sft_dist.metrics import wandb_run
from sft_dist.metrics.logger import RunLogger
from sft_dist.metrics.tensorboard_run import TensorboardRun
from sft_dist.metrics.tracker import MOST_WAITING, Feed, Lines, Table
from tests.helpers.offline_wandb import OfflineRun, offline_runs

OFF = LoggingConfig(wandb=WandbConfig(mode="disabled"))


def to_wandb(mode: Any = "offline") -> LoggingConfig:
    return LoggingConfig(wandb=WandbConfig(mode=mode))


def line(step: int, **more: float) -> dict[str, int | float]:
    return {"step": step, "loss": 1.5, "tokens_per_s": 10.0, "step_time_s": 0.1, "lr": 1e-3, **more}


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


class FakeWandb(SimpleNamespace):
    """A run of W&B that keeps what it is given and breaks at step 2."""

    def __init__(self) -> None:
        super().__init__(logged=[], finished=[], ids=[], id="first", step=0, Settings=lambda **_: None)
        self.is_preempting = False

    def init(self, **settings: Any) -> FakeWandb:
        self.ids.append((settings["id"], settings["resume"]))
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step == 2:
            raise OSError("disk full")
        self.logged.append((step, metrics["loss"]))

    def teardown(self) -> None:
        pass

    def mark_preempting(self) -> None:
        self.is_preempting = True

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def cores() -> list[psutil.Process]:
    """W&B's own processes, as soon as there are some."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = [child for child in psutil.Process().children() if "wandb-core" in child.name()]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("W&B has no process")


def settle(logger: RunLogger) -> None:
    """Waits until what came before is with all trackers."""
    for tracker in logger._trackers:
        done = threading.Event()
        tracker.put(lambda _, done=done: done.set())  # type: ignore[misc]
        assert done.wait(60)


def end_wandb(logger: RunLogger) -> None:
    settle(logger)
    ended = cores()
    for child in ended:
        child.terminate()
    psutil.wait_procs(ended, timeout=10)


def last_run(folder: Path) -> OfflineRun:
    """When it has come to its end: W&B writes on when it has answered that it is finished."""
    until = time.monotonic() + 20
    while (last := offline_runs(folder)[-1]).exit_code is None and time.monotonic() < until:
        time.sleep(0.05)
    return last


class FakeTracker:
    """Does nothing."""

    name, patience_s = "Fake", 1.0

    def log(self, metrics: Mapping[str, Any], *, lines: Lines) -> None: ...

    def replay(self, lines: list[str]) -> None: ...

    def table(self, table: Table, *, lines: Lines) -> None: ...

    def conclude(self, results: Mapping[str, Any], artefact: Path, *, lines: Lines) -> None: ...

    def finish(self, *, code: int, is_preempted: bool, lines: Lines) -> None: ...

    def give_up(self) -> None: ...


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(wandb_run, "PAUSE_S", 0.0)
    return fake


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=2) as logger:
        logger.training_step(line(1))
        assert written(tmp_path) == [line(1)]
        logger.evaluation({"step": 1, "eval_loss": 0.5, "eval_perplexity": math.exp(0.5)})
        assert written(tmp_path)[1] == {"step": 1, "eval_loss": 0.5, "eval_perplexity": math.exp(0.5)}


def test_what_people_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=4) as logger:
        logger.training_step(line(1, step_time_s=10.0))
        logger.evaluation(
            {"step": 1, "eval_loss": 0.5, "eval_perplexity": 1.65, "eval_loss/chat": 0.75, "eval_long_loss": 2.0,
             "eval_scores/bleu": 30.25, "eval_scores/bleu/chat": 12.0}
        )  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        "step 1/4  loss 1.5000  10 tokens/s  lr 1.00e-03  about 30 s left",
        "eval at step 1: loss 0.5000, perplexity 1.65", "  chat: 0.7500", "  long_loss 2, bleu 30.25",
    ]  # fmt: skip


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=2) as logger:
        logger.training_step(line(1, loss=math.nan, grad_norm=math.inf))
    assert written(tmp_path) == [{**line(1), "loss": None, "grad_norm": None, "non_finite": ["loss", "grad_norm"]}]


def test_a_failure_of_wandb_is_said_once_and_stops_nothing(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=4) as logger:
        for step in (1, 2, 3, 4):
            logger.training_step(line(step))
    assert [entry["step"] for entry in written(tmp_path)] == [1, 2, 3, 4]
    assert wandb.logged == [(1, 1.5)] * 2, "started again once, with all lines, and broken again"
    assert wandb.ids == [(None, None), ("first", None)]
    assert capsys.readouterr().out.count("W&B takes nothing more (disk full)") == 1


def test_wandb_cannot_end_the_program(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its teardown exits with the code of its process, which is killed where it does not come to its end."""
    ends = threading.Event()
    monkeypatch.setattr(wandb_run, "OFFLINE_S", 0.2)
    wandb.finish = lambda exit_code: ends.wait(60)
    wandb.teardown = lambda: sys.exit(-9)
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=1) as logger:
        logger.training_step(line(1))
    ends.set()
    assert "W&B takes nothing more (it has not ended within 0 s)" in capsys.readouterr().out


def test_nor_can_what_a_tracker_does_in_its_thread(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.log = lambda metrics, step: sys.exit("gone")
    started = time.monotonic()
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=1) as logger:
        logger.training_step(line(1))
    assert time.monotonic() - started < wandb_run.OFFLINE_S / 2, "nobody waits for a thread that has ended"
    assert "W&B takes nothing more (gone)" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code"), [(None, 0), (KeyboardInterrupt, 1), (ValueError, 1)])
def test_wandb_is_told_how_the_run_ended(
    tmp_path: Path, wandb: FakeWandb, error: type[BaseException] | None, code: int
) -> None:
    def run() -> None:
        with RunLogger(tmp_path, to_wandb(), {}, num_steps=1) as logger:
            logger.training_step(line(1))
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    assert wandb.logged == [(1, 1.5)]
    assert wandb.finished == [code]


def test_wandb_is_told_that_the_run_was_preempted(tmp_path: Path, wandb: FakeWandb) -> None:
    with (
        pytest.raises(Preempted),
        RunLogger(tmp_path, to_wandb(), {}, num_steps=1),
    ):
        raise Preempted("preempted", fix="go on")
    assert (wandb.is_preempting, wandb.finished) == (True, [1])


def test_wandb_that_does_not_start_is_a_mistake_in_the_config(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key\nand more lines")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError) as caught:
        RunLogger(tmp_path, to_wandb("online"), {}, num_steps=1)
    assert caught.value.what == "logging.wandb.mode=online: W&B did not start (no API key)"
    assert "offline" in caught.value.fix
    assert not list(tmp_path.iterdir()), "the folder is not taken"


@pytest.mark.parametrize(("mode", "resume"), [("offline", None), ("online", "allow")])
def test_a_resumed_run_is_the_same_run_for_wandb(
    tmp_path: Path, wandb: FakeWandb, mode: Any, resume: str | None
) -> None:
    for completed in (0, 3, 0):  # the last: one that was killed before it had saved
        with RunLogger(tmp_path, to_wandb(mode), {}, num_steps=4, completed=completed):
            pass
    assert wandb.ids == [(None, None), ("first", resume), ("first", resume)]


@pytest.mark.parametrize(("mode", "logged"), [("offline", [1, 3, 4, 5]), ("online", [4, 5])])
def test_wandb_gets_the_lines_of_earlier_starts_that_it_lacks(
    tmp_path: Path, wandb: FakeWandb, mode: Any, logged: list[int]
) -> None:
    wandb.step = 4  # what a server knows: the first step that it lacks
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in (1, 3, 4, 9)))
    with RunLogger(tmp_path, to_wandb(mode), {}, num_steps=9, completed=4) as logger:
        logger.training_step(line(5))
    assert [step for step, _ in wandb.logged] == logged


def test_wandb_gets_what_was_not_finite_as_that(tmp_path: Path, wandb: FakeWandb) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=9) as logger:
        logger.training_step(line(1, loss=math.nan))
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=9, completed=1):
        pass
    [(step, loss)] = wandb.logged
    assert (step, math.isnan(loss)) == (1, True)


def test_wandb_is_started_again_so_often_and_no_more(
    tmp_path: Path, wandb: FakeWandb, capsys: pytest.CaptureFixture[str]
) -> None:
    known: set[int] = set()

    def log(metrics: dict[str, Any], step: int) -> None:
        if step not in known:  # its process is gone whenever there is something new
            known.add(step)
            raise OSError("gone")

    wandb.log = log
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=9) as logger:
        for step in range(1, 7):
            logger.training_step(line(step))
            done = threading.Event()
            logger._track(lambda _, done=done: done.set())
            done.wait(0.5)  # a lost one does nothing more
    assert len(wandb.ids) == 1 + wandb_run.MAX_RESTARTS
    assert capsys.readouterr().out.count("W&B takes nothing more (gone)") == 1


def test_a_process_of_wandb_that_is_gone_is_replaced_and_loses_nothing(tmp_path: Path) -> None:
    """As a scheduler's SIGTERM to all processes of a job ends it, in mid-run and again before the end."""

    def preempted() -> None:
        with RunLogger(tmp_path, to_wandb(), {}, num_steps=9, completed=1) as logger:
            logger.training_step(line(2, loss=math.nan))
            end_wandb(logger)
            logger.training_step(line(3))
            end_wandb(logger)
            raise Preempted("preempted", fix="go on")

    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    with pytest.raises(Preempted):
        preempted()
    assert last_run(tmp_path) == OfflineRun((tmp_path / "wandb/run_id").read_text(), [1, 2, 3], exit_code=1)


def test_a_new_process_of_wandb_gets_tables_and_results_again(tmp_path: Path) -> None:
    """It ends in mid-run, and once more when the results are with it and it is to finish."""
    rows = [[1, "q", "a"]]
    (tmp_path / "final").mkdir()
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=9) as logger:
        logger.training_step(line(1))
        logger.table(Table("samples", ["step", "prompt", "answer"], lambda: rows, step=1))
        logger.training_step(line(2))
        end_wandb(logger)
        logger.training_step(line(3))  # lost with the process that is gone
        logger.training_step(line(4))
        settle(logger)
        rows.append([4, "q", "b"])
        logger.conclude({"wasted_s": 7}, tmp_path / "final")
        end_wandb(logger)
    last = last_run(tmp_path)
    assert last == OfflineRun((tmp_path / "wandb/run_id").read_text(), [1, 2, 3, 4], exit_code=0)
    assert last.tables == {"samples": (4, [[1, "q", "a"], [4, "q", "b"]])}, "as it is when it is repeated"
    assert last.summary["wasted_s"] == 7


def test_a_tracker_that_hangs_holds_up_neither_a_step_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the process of W&B stands still."""
    monkeypatch.setattr(wandb_run, "OFFLINE_S", 1.0)
    # Of so many steps the console gets no line: printing 2,000 takes a second of its own, two on a busy machine.
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=1_000_000) as logger:
        logger.training_step(line(1))
        [core] = cores()
        core.suspend()
        began = time.monotonic()
        for _ in range(2_000):
            logger.training_step(line(2))
        assert time.monotonic() - began < 2
    assert time.monotonic() - began < 5
    assert "W&B takes nothing more (it has not ended within 1 s)" in capsys.readouterr().out
    assert len(written(tmp_path)) == 2_001
    psutil.wait_procs([core], timeout=10)
    assert not core.is_running(), "Python would wait for it when it ends"


def test_of_a_tracker_that_does_not_answer_no_more_waits_than_memory_allows() -> None:
    stands, done = threading.Event(), threading.Event()

    class Stuck(FakeTracker):
        def log(self, metrics: Mapping[str, Any], *, lines: Lines) -> None:
            stands.set()
            done.wait(30)

    feed = Feed(Stuck())
    for _ in range(MOST_WAITING + 2):
        feed.put(lambda tracker: tracker.log({}, lines=list))
        stands.wait(10)
    assert feed.news() == "it does not answer, and 10,000 lines wait for it"
    assert feed.news() is None, "told once"
    done.set()


def test_trackers_get_tables_and_results_and_no_secret(tmp_path: Path) -> None:
    settings = {"cluster": {"environment": {"HF_TOKEN": "hf_" + "a" * 30}}, "output_dir": "runs/x"}
    logging = to_wandb().model_copy(update={"tensorboard": True})
    (tmp_path / "final").mkdir()
    with RunLogger(tmp_path, logging, settings, num_steps=2) as logger:
        logger.training_step(line(1, loss=math.nan))
        logger.evaluation({"step": 1, "eval_loss": 0.5, "eval_perplexity": 1.6, "eval_scores/chrf/ja": 7.5})
        logger.table(Table("samples", ["prompt", "answer"], lambda: [["日本の首都は?", "東京 | です\n。"]], step=1))
        logger.conclude({"loss": 0.5, "base": "hf_" + "a" * 30}, tmp_path / "final")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"hf_aaaaaaaa" in path.read_bytes()]
    [offline] = tmp_path.glob("wandb/offline-run-*")
    assert list(offline.glob("files/media/table/samples_*.table.json"))
    [events] = (tmp_path / "tensorboard").iterdir()
    seen = EventAccumulator(str(events)).Reload()
    assert set(seen.Tags()["scalars"]) >= {"train/loss", "train/lr", "eval/loss", "eval/perplexity"}
    assert "eval_scores/chrf/ja" in seen.Tags()["scalars"], "as in W&B"
    assert [(event.step, event.value) for event in seen.Scalars("eval/loss")] == [(1, 0.5)]
    assert math.isnan(seen.Scalars("train/loss")[0].value)
    assert "東京 \\| です<br>。" in seen.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()


def test_tensorboard_of_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    on = OFF.model_copy(update={"tensorboard": True})
    for completed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with RunLogger(tmp_path, on, {}, num_steps=4, completed=completed) as logger:
            for step in steps:
                logger.training_step(line(step, loss=10.0 * completed + step))
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in seen] == [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0)]


def test_tensorboard_gets_all_lines_where_its_folder_was_deleted(tmp_path: Path) -> None:
    before = [line(1), line(2, loss=math.nan), {"step": 2, "eval_scores/bleu": 30.0}]
    with RunLogger(tmp_path, OFF, {}, num_steps=4) as logger:
        for each in before:
            logger._write(each)
    TensorboardRun(tmp_path, completed=2).finish(code=1, is_preempted=False, lines=list)  # had written nothing yet
    on = OFF.model_copy(update={"tensorboard": True})
    with RunLogger(tmp_path, on, {}, num_steps=4, completed=2) as logger:
        logger.training_step(line(3))
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in seen.Scalars("train/loss")] == [1, 2, 3]
    assert math.isnan(seen.Scalars("train/loss")[1].value)
    assert [(event.step, event.value) for event in seen.Scalars("eval_scores/bleu")] == [(2, 30.0)]


def test_tensorboard_of_a_run_that_goes_back_has_each_step_once(tmp_path: Path) -> None:
    with RunLogger(tmp_path, OFF.model_copy(update={"tensorboard": True}), {}, num_steps=4) as logger:
        logger.evaluation({"step": 0, "eval_loss": 5.0, "eval_perplexity": 20.0})
        for step in (1, 2, 3):
            logger.training_step(line(step))
        logger.go_back(1)
        logger.training_step(line(2, loss=9.0))
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [(1, 1.5), (2, 9.0)]
    assert len(seen.Scalars("eval/loss")) == 1


def test_tensorboard_of_a_run_that_begins_anew_has_nothing_of_before(tmp_path: Path) -> None:
    """Killed before it had saved: its first steps are trained again."""
    on = OFF.model_copy(update={"tensorboard": True})
    for start, steps in ((0, (1, 2, 3)), (1, (1, 2))):
        with RunLogger(tmp_path, on, {}, num_steps=4) as logger:
            logger.evaluation({"step": 0, "eval_loss": 5.0 + start, "eval_perplexity": 20.0})
            for step in steps:
                logger.training_step(line(step, loss=10.0 * start + step))
    seen = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [(1, 11.0), (2, 12.0)]
    assert [(event.step, event.value) for event in seen.Scalars("eval/loss")] == [(0, 6.0)]


def test_tensorboard_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"logging\.tensorboard: TensorBoard cannot be imported") as caught:
        RunLogger(tmp_path, OFF.model_copy(update={"tensorboard": True}), {}, num_steps=1)
    assert "pip install 'sft-dist[tensorboard]'" in caught.value.fix


@pytest.mark.parametrize(("completed", "kept"), [(0, []), (1, [0, 1, 1]), (2, [0, 1, 1, 2]), (9, [0, 1, 1, 2, 3])])
def test_a_resumed_run_goes_on_after_the_lines_of_its_checkpoint(
    tmp_path: Path, completed: int, kept: list[int]
) -> None:
    """What was trained after the checkpoint is trained again; what a dying process wrote last may be half a line."""
    before = [{"step": 0, "eval_loss": 3.0}, line(1), {"step": 1, "eval_loss": 2.0}, line(2), line(3)]
    text = "".join(json.dumps(entry) + "\n" for entry in before)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 1, "lo\n' + '{"step": 1, "loss": 2.0}')
    with RunLogger(tmp_path, OFF, {}, num_steps=10, completed=completed) as logger:
        logger.training_step(line(completed + 1))
    assert [entry["step"] for entry in written(tmp_path)] == [*kept, completed + 1]


@pytest.mark.parametrize(("mode", "logged"), [("offline", [0, 1, 2, 3, 0, 1, 1, 2]), ("online", [0, 1, 2, 3, 1, 2])])
def test_a_run_that_goes_back_trains_the_steps_again(
    tmp_path: Path, wandb: FakeWandb, mode: Any, logged: list[int]
) -> None:
    """In one process: the lines of what is lost are gone, those of the start and of what stays are there."""
    logged_now: list[int] = []
    wandb.log = lambda metrics, step: logged_now.append(step)
    with RunLogger(tmp_path, to_wandb(mode), {}, num_steps=4) as logger:
        logger.evaluation({"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.0})
        for step in (1, 2, 3):
            logger.training_step(line(step, loss=math.nan if step == 3 else 1.0))
        logger.go_back(1)
        logger.event({"step": 1, "event": "rolled_back", "of_step": 3, "of_loss": math.nan, "ranks": [1]}, "")
        logger.training_step(line(2))
    assert [(entry["step"], entry.get("event")) for entry in written(tmp_path)] == [
        (0, None), (1, None), (1, "rolled_back"), (2, None)
    ]  # fmt: skip
    assert written(tmp_path)[2] == {
        "step": 1, "event": "rolled_back", "of_step": 3, "of_loss": None, "ranks": [1], "non_finite": ["of_loss"]
    }  # fmt: skip
    assert logged_now == logged


def test_lines_that_wait_for_room_go_back_too(tmp_path: Path) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=4) as logger:
        logger._lines.waiting.extend(json.dumps(line(step)) for step in (1, 2))
        logger.go_back(1)
        logger.training_step(line(2, loss=9.0))
    assert [(entry["step"], entry["loss"]) for entry in written(tmp_path)] == [(1, 1.5), (2, 9.0)]


def test_a_run_that_goes_back_to_its_start_keeps_what_was_before_it(tmp_path: Path) -> None:
    with RunLogger(tmp_path, OFF, {}, num_steps=4) as logger:
        logger.evaluation({"step": 0, "eval_loss": 3.0, "eval_perplexity": 20.0})
        logger.training_step(line(1))
        logger.go_back(0)
    assert [entry["step"] for entry in written(tmp_path)] == [0]
