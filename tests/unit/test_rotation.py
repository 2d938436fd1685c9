"""Which checkpoints stay: the last, one for every so many hours, and the best."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import Position
from sft_dist.checkpoint.rotation import best_of, rotate, superfluous
from sft_dist.config.schema import CheckpointConfig
from tests.helpers.checkpoints import make_checkpoint

HOUR = 3600.0


def positions(*hours: float, losses: dict[int, float] | None = None) -> list[Position]:
    return [
        Position(completed_steps=step, trained_s=at * HOUR, eval_loss=(losses or {}).get(step))
        for step, at in enumerate(hours, 1)
    ]


def kept(there: list[Position], **rules: object) -> list[int]:
    gone = superfluous(there, CheckpointConfig.model_validate(rules))
    return [p.completed_steps for p in there if p.completed_steps not in gone]


def test_the_last() -> None:
    there = positions(1, 2, 3, 4)
    assert kept(there, keep_last=2) == kept(there[::-1], keep_last=2)[::-1] == [3, 4]
    assert kept(there, keep_last=9) == [1, 2, 3, 4]
    assert superfluous(there, CheckpointConfig(keep_last=1)) == [1, 2, 3], "the oldest goes first"


def test_one_for_every_so_many_hours() -> None:
    there = positions(0.5, 1.9, 2.0, 2.1, 3.9, 4.5, 8.5, 8.6, 8.7)
    assert kept(there, keep_last=1, keep_every_hours=2) == [3, 6, 7, 9], "first behind hours 2, 4 and 8, and the last"


@pytest.mark.parametrize("rounds", [1, 9])
def test_deleting_after_each_save_keeps_the_same(rounds: int) -> None:
    """Not only when they are all there: what stays does so for good."""
    there: list[Position] = []
    for new in positions(0.5, 1.9, 2.0, 2.1, 3.9, 4.5, 8.5, 8.6, 8.7, losses={2: 0.5, 5: 0.5, 8: 0.9}):
        there.append(new)
        for _ in range(rounds):
            gone = superfluous(there, CheckpointConfig(keep_last=1, keep_every_hours=2, keep_best=True))
            there = [position for position in there if position.completed_steps not in gone]
    assert [position.completed_steps for position in there] == [2, 3, 6, 7, 9]


def test_the_best() -> None:
    there = positions(1, 2, 3, 4, 5, losses={1: 0.9, 2: 0.4, 4: 0.4})
    assert kept(there, keep_last=1, keep_best=True) == [2, 5], "the first of equals"
    assert kept(there, keep_last=1) == [5]
    assert kept(positions(1, 2), keep_last=1, keep_best=True) == [2], "nothing was evaluated"
    best = best_of(there, CheckpointConfig().goal)
    assert best is not None
    assert best.completed_steps == 2


def test_the_best_by_another_metric() -> None:
    there = [
        Position(completed_steps=step, eval_loss=loss, evaluation={"eval_scores/bleu": bleu})
        for step, loss, bleu in ((1, 0.9, 0.1), (2, 0.4, 0.3), (3, 0.5, 0.7), (4, 0.6, 0.7), (5, 0.7, 0.2))
    ]
    assert kept(there, keep_last=1, keep_best=True, best_metric="eval_scores/bleu") == [3, 5]
    assert kept(there, keep_last=1, keep_best=True, best_metric="eval_scores/bleu", best_mode="min") == [1, 5]
    assert kept(there, keep_last=1, keep_best=True, best_metric="nowhere", best_mode="min") == [5]
    there.append(Position(completed_steps=6, eval_loss=math.nan))
    assert kept(there, keep_last=1, keep_best=True) == [2, 6], "what is no number is not the best"


def test_what_cannot_be_read_is_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    folder = tmp_path / "checkpoints"
    (folder / "step-00000004/manifest.json").write_text("{")
    (folder / "step-00000001/manifest.json").unlink()
    assert rotate(folder, CheckpointConfig(keep_last=1)) == [folder / "step-00000002"]
    assert [path.name[-1] for path in store.complete_checkpoints(folder)] == ["1", "3", "4"]
