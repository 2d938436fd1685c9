"""When a run stops early, when it is told that it overfits, and which metric is better which way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft_dist.checkpoint.manifest import Position, Waiting
from sft_dist.config.control_schema import EarlyStoppingConfig, Goal, known_mode
from sft_dist.config.schema import CheckpointConfig
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.control import Control
from sft_dist.train.early_stopping import EarlyStopping, has_fired
from sft_dist.train.final_state import FinalState
from sft_dist.train.overfitting import OverfitWatch
from tests.helpers import cells

NAN = math.nan


def stopped_at(values: list[float], **settings: object) -> int | None:
    """The evaluation, counted from 1, after which a run ends."""
    stopping = EarlyStopping(EarlyStoppingConfig.model_validate(settings), None)
    for number, value in enumerate(values, 1):
        stopping.evaluated(number, {str(settings.get("metric", "eval_loss")): value})
        if stopping.has_fired:
            return number
    return None


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([5, 4, 3, 2], {"patience": 1}, None),
        ([5, 4, 4], {"patience": 1}, 3),
        ([5, 4, 4.5, 3.9, 5, 5, 5], {"patience": 2}, 6),
        ([5, 4, 3.95, 3.91], {"patience": 2, "threshold": 0.1}, 4),
        ([5, 4, 3.95, 3.89], {"patience": 2, "threshold": 0.1}, None),
        ([5, NAN, NAN], {"patience": 2}, 3),
        ([NAN, 5, 6], {"patience": 2}, None),
        ([0.1, 0.3, 0.2, 0.25], {"patience": 2, "metric": "eval_scores/bleu"}, 4),
        ([0.3, 0.1, 0.2], {"patience": 2, "metric": "x", "mode": "min"}, None),
    ],
)
def test_it_stops_after_so_many_evaluations_without_an_improvement(
    values: list[float], settings: dict[str, object], expected: int | None
) -> None:
    assert stopped_at(values, **settings) == expected


def test_it_goes_on_where_it_was() -> None:
    config = EarlyStoppingConfig(patience=3)
    values = [5.0, 4.0, 4.2, 4.1, 4.3]
    for cut in range(len(values)):
        first = EarlyStopping(config, None)
        for step, value in enumerate(values[:cut], 1):
            first.evaluated(step, {"eval_loss": value})
        second = EarlyStopping(config, Waiting.model_validate_json(first.waiting.model_dump_json()))
        for step, value in enumerate(values[cut:], cut + 1):
            assert not second.has_fired
            second.evaluated(step, {"eval_loss": value})
        assert second.has_fired
        assert second.waiting == Waiting(best=4.0, best_step=2, evaluations=3)
    assert second.told(5) == (
        "stopped early at step 5: eval_loss was 4.0000 at step 2, and 3 evaluations since then have not improved it"
    )
    assert second.metrics() == {
        "early_stopping/fired": 1, "early_stopping/evaluations": 3, "early_stopping/best": 4.0,
        "early_stopping/best_step": 2,
    }  # fmt: skip
    nothing = EarlyStopping(config, Waiting(best=0.0, best_step=2, evaluations=1)).told(3)
    assert nothing.endswith("eval_loss was 0.0000 at step 2, and 1 evaluation since then has not improved it")
    assert "eval_loss never was a number" in EarlyStopping(config, None).told(3)
    assert not has_fired(EarlyStoppingConfig(patience=4), second.waiting), "the patience of now decides"
    assert not has_fired(None, second.waiting)


def test_a_metric_that_is_not_there_is_named_with_those_that_are() -> None:
    stopping = EarlyStopping(EarlyStoppingConfig(metric="eval_los", mode="min"), None)
    with pytest.raises(ConfigError) as caught:
        stopping.evaluated(3, {"eval_loss": 1.0, "eval_perplexity": 2.0})
    assert caught.value.fix == "set early_stopping.metric to one of: eval_loss, eval_perplexity"


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("eval_loss", "min"), ("eval_perplexity", "min"), ("eval_loss/chat", "min"), ("eval_loss/bleu", "min"),
        ("eval_scores/bleu", "max"), ("eval_accuracy", "max"), ("eval_scores/rougeL", "max"), ("eval_length", None),
    ],
)  # fmt: skip
def test_names_that_say_what_is_better(metric: str, mode: str | None) -> None:
    assert known_mode(metric) == mode


def test_nothing_is_better_by_being_no_number() -> None:
    for mode in ("min", "max"):
        goal = Goal("x", mode)  # type: ignore[arg-type]
        assert not goal.is_better(NAN, None)
        assert not goal.is_better(NAN, 1.0)
        assert not goal.is_better(math.inf, None)
        assert not goal.is_better(-math.inf, 1.0)
        assert goal.is_better(1.0, None)
        assert not goal.is_better(1.0, 1.0)


class Told:
    """In place of a logger."""

    def __init__(self) -> None:
        self.events: list[tuple[dict[str, Any], str]] = []

    def event(self, line: dict[str, Any], text: str) -> None:
        self.events.append((line, text))


def test_an_evaluation_that_is_no_number_is_told_and_nothing_gained(tiny_base: Path, tmp_path: Path) -> None:
    cfg = cells.config(
        str(tiny_base), data={"eval": [{"path": "unused"}]}, eval={"every_steps": 1}, checkpoint={"keep_best": True},
        early_stopping={"patience": 2},
    ).model_copy(update={"output_dir": str(tmp_path)})  # fmt: skip
    (tmp_path / "metrics.jsonl").touch()
    told: Any = Told()
    control = Control(resolve(cfg, WorldShape(1, 1)), told, None, None)
    bad = {"eval_loss": NAN, "eval_perplexity": NAN, "eval_loss/a": NAN, "eval_loss/b": 2.0}
    control.evaluated(1, bad)
    assert not control.is_best
    assert control.of_position()["evaluation"] == {"eval_loss/b": 2.0}
    ((line, text),) = told.events
    assert line == {"step": 1, "event": "non_finite_evaluation", "of_metrics": "eval_loss, eval_loss/a"}
    assert text == (
        "evaluation at step 1: eval_loss, eval_loss/a are not finite; it is not the best state; early stopping counts it "
        "as no improvement"
    )
    control.trained()
    control.evaluated(2, {"eval_loss": 800.0, "eval_perplexity": math.inf})
    assert control.is_best
    assert len(told.events) == 1, "exp of a large number is no trouble"
    control.saved()
    for step in (3, 4):
        assert not control.stops
        control.trained()
        control.evaluated(step, {"eval_loss": math.inf, "eval_perplexity": math.inf})
        assert not control.is_best
    assert control.stops


# The best state


def control(best: Position | None = None, *, keep_best: bool = True, metric: str = "eval_loss") -> Control:
    run: Any = SimpleNamespace(
        checkpoint=CheckpointConfig(keep_best=keep_best, best_metric=metric),
        early_stopping=EarlyStoppingConfig(),
        eval=SimpleNamespace(warn_after_rises=None),
    )
    logger: Any = Told()
    return Control(run, logger, best, None)


def test_the_best_state_is_kept_once_and_of_equals_the_first() -> None:
    decides, kept = control(), []
    for step, loss in enumerate((5.0, 4.0, NAN, 4.5, 4.0, 3.0), 1):
        decides.trained()
        assert not decides.is_best, "not evaluated yet"
        decides.evaluated(step, {"eval_loss": loss})
        if decides.is_best:
            kept.append(step)
            decides.saved()
            assert not decides.is_best, "it is kept"
        decides.saved()  # what is saved in any case is not the best for that
    assert kept == [1, 2, 6]
    assert decides.waiting == Waiting(best=3.0, best_step=6)
    worse = control(keep_best=False)
    worse.evaluated(1, {"eval_loss": 1.0})
    assert not worse.is_best


def test_a_resumed_run_knows_the_best_of_before() -> None:
    before = Position(completed_steps=4, eval_loss=2.0, evaluation={"eval_scores/bleu": 30.0})
    for metric, values in (("eval_loss", (2.5, 2.0, 1.5)), ("eval_scores/bleu", (20.0, 30.0, 31.0))):
        decides = control(before, metric=metric)
        found = []
        for value in values:
            decides.evaluated(5, {"eval_loss": 9.0} | {metric: value})
            found.append(decides.is_best)
        assert found == [False, False, True]


def test_what_a_checkpoint_tells_of_its_evaluation() -> None:
    decides = control()
    decides.evaluated(3, {"eval_loss": 2.0, "eval_perplexity": math.inf, "eval_scores/bleu": 30.0})
    told_of_it = decides.of_position()
    assert (told_of_it["eval_loss"], told_of_it["evaluation"]) == (2.0, {"eval_scores/bleu": 30.0})
    assert told_of_it["waiting"] == Waiting(best=2.0, best_step=3)
    decides.trained()
    assert (decides.of_position()["eval_loss"], decides.of_position()["evaluation"]) == (None, {})


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (FinalState(40, 40, 40), "of step 40, the last one"),
        (FinalState(30, 30, 40, stopped_early=True),
         "of step 30, the last one; stopped early after step 30 of 40"),
        (FinalState(20, 40, 40, "eval_loss", 0.5),
         "of step 20, the best evaluation: eval_loss 0.5000; training ended after step 40"),
        (FinalState(20, 30, 40, "eval_loss", 0.0, stopped_early=True),
         "of step 20, the best evaluation: eval_loss 0.0000; training stopped early after step 30 of 40"),
    ],
)  # fmt: skip
def test_which_state_a_card_names(state: FinalState, said: str) -> None:
    assert state.told() == said


# Overfitting


def told(evaluations: list[float], train: list[float], rises: int = 2) -> list[int]:
    """Evaluations, counted from 1, at which a warning comes; before each a step of training with its loss."""
    watch = OverfitWatch(rises)
    found = []
    for number, (loss, trained) in enumerate(zip(evaluations, train, strict=True), 1):
        watch.trained(trained)
        if watch.evaluated(number, loss) is not None:
            found.append(number)
    return found


@pytest.mark.parametrize(
    ("evaluations", "train", "expected"),
    [
        ([3, 2, 2.1, 2.2, 2.3], [5, 4, 3, 2, 1], [4]),
        ([3, 2, 2.1, 2.05, 2.2, 2.3], [5, 4, 3, 2, 1, 1], [6]),
        ([3, 2, 2.1, 2.2, 2.3], [5, 4, 4.5, 5, 6], []),
        ([3, 2, 2.1, 2.1, 2.2], [5, 4, 3, 2, 1], []),
        ([3, 2.5, 2], [5, 4, 3], []),
        ([2, 3, 4], [5, 4, 5], []),
        ([2, 3, 4], [5, 4, 3], [3]),
        ([NAN, 2, NAN, 3, 4], [6, 5, 4.5, 4, 3], [5]),
    ],
)
def test_a_gap_that_grows_is_told_once(evaluations: list[float], train: list[float], expected: list[int]) -> None:
    assert told(evaluations, train) == expected


def test_the_evaluation_before_training_has_no_training_loss_to_compare_with() -> None:
    watch = OverfitWatch(1)
    assert watch.evaluated(0, 1.0) is None
    watch.trained(5.0)
    assert watch.evaluated(1, 2.0) is None
    watch.trained(4.0)
    said = watch.evaluated(2, 3.0)
    assert said is not None
    assert "risen 1 times in a row, 2.0000 to 3.0000, while the training loss fell from 5.0000 to 4.0000" in said
    assert "The best evaluation is that of step 0 (1.0000)" in said


def test_the_training_loss_is_the_mean_of_the_steps_between() -> None:
    watch = OverfitWatch(1)
    said = []
    for step, losses in enumerate(([4.0, 2.0], [6.0, 1.0], [3.0, 2.0]), 1):
        for loss in losses:
            watch.trained(loss)
        said.append(watch.evaluated(step, float(step)))
    assert said[:2] == [None, None]
    assert said[2] is not None
    assert "fell from 3.5000 to 2.5000" in said[2]


def test_a_resumed_run_reads_what_was_before() -> None:
    lines: list[dict[str, object]] = []
    for step, (trained, loss) in enumerate(zip([5, 4, 3], [2.0, 2.1, 2.2], strict=True), 1):
        lines += [{"step": step, "loss": trained}, {"step": step, "eval_loss": loss, "eval_loss/a": 9.0}]
    lines.append({"step": 4, "loss": None, "non_finite": ["loss"]})
    watch = OverfitWatch(3, map(json.dumps, lines))
    watch.trained(2.0)
    assert watch.evaluated(4, 2.3) is not None
    watch = OverfitWatch(3, map(json.dumps, [*lines, {"step": 3, "overfitting": 1, "best_eval_step": 1}]))
    watch.trained(2.0)
    assert watch.evaluated(4, 2.3) is None, "it was told before"


@pytest.mark.parametrize(
    ("stopping", "checkpoint", "expected"),
    [
        (None, {"keep_best": True}, Goal("eval_loss", "min")),
        ({"metric": "eval_scores/chrf"}, {}, Goal("eval_scores/chrf", "max")),
        ({"metric": "eval_scores/custom", "mode": "min"}, {}, Goal("eval_scores/custom", "min")),
        (
            {"metric": "eval_scores/custom", "mode": "min"},
            {"best_metric": "eval_scores/custom"},
            Goal("eval_scores/custom", "min"),
        ),
        ({"metric": "eval_scores/chrf"}, {"best_metric": "eval_loss"}, Goal("eval_loss", "min")),
        (
            {"metric": "eval_scores/chrf"},
            {"best_metric": "eval_scores/custom", "best_mode": "max"},
            Goal("eval_scores/custom", "max"),
        ),
    ],
)
def test_what_is_best_is_what_early_stopping_waits_for_unless_it_is_said(
    tiny_base: Path, stopping: dict[str, Any] | None, checkpoint: dict[str, Any], expected: Goal
) -> None:
    sections = {} if stopping is None else {"early_stopping": stopping}
    config = cells.config(str(tiny_base), checkpoint=checkpoint, **sections)
    run = resolve(config, WorldShape(1, 1))
    assert run.checkpoint.goal == config.best_goal == expected
