"""Which losses are troubles, and what is done about them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sft_dist.checkpoint.manifest import Position
from sft_dist.config.spikes_schema import SpikesConfig
from sft_dist.train.spikes import Spikes

START = Position(completed_steps=0)


def spikes(losses: list[float], position: Position = START, **rules: Any) -> Spikes:
    """After steps with these losses."""
    watch = Spikes(SpikesConfig.model_validate({"window": 4, "factor": 3.0} | rules), position)
    for loss in losses:
        watch.trained(loss)
    return watch


@pytest.mark.parametrize(
    ("losses", "loss", "is_spike"),
    [
        ([1.0], 50.0, False),  # half of the window is not there yet
        ([1.0, 1.0], 3.0, False),  # the factor itself is none
        ([1.0, 1.0], 3.01, True),
        ([1.0, 1.0, 9.0], 3.01, True),  # a spike that was trained moves no median
        ([1.0, 1.0, 2.0, 2.0, 2.0, 2.0], 5.9, False),  # what is behind the window does not count
        ([2.0, 2.0, 1.0, 1.0, 1.0, 1.0], 3.01, True),
    ],
)
def test_a_spike_is_told_by_the_median_of_the_last_losses(losses: list[float], loss: float, is_spike: bool) -> None:
    watch = spikes(losses)
    trouble = watch.trouble(10, loss, 1.0)
    assert (trouble is not None) == is_spike
    assert watch.admits(10, loss), "it is only told"
    if trouble is not None:
        assert (trouble.kind, trouble.remedy) == ("spike", "warn")
    assert spikes(losses, policy="off").trouble(10, loss, 1.0) is None
    assert spikes(losses, policy="skip").admits(10, loss) != is_spike


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0), (1.0, math.nan)])
@pytest.mark.parametrize("policy", ["off", "warn", "skip"])
def test_what_is_not_finite_has_a_rule_of_its_own(policy: str, loss: float, norm: float) -> None:
    for remedy in ("stop", "skip", "roll_back"):
        watch = spikes([1.0] * 4, policy=policy, non_finite=remedy)
        trouble = watch.trouble(5, loss, norm)
        assert trouble is not None
        assert (trouble.kind, trouble.remedy) == ("non_finite", remedy)
        assert watch.admits(5, loss) == math.isfinite(loss)


def test_too_many_in_a_row_end_the_run() -> None:
    watch = spikes([1.0] * 4, policy="skip", max_in_a_row=2)
    for step in (3, 6, 7):
        watch.leave_out(step)
    assert watch.trouble(5, 9.0, 1.0).remedy == "skip"  # type: ignore[union-attr]
    last = watch.trouble(8, 9.0, 1.0)
    assert last is not None
    assert (last.remedy, last.why) == ("stop", "the 2 steps before it were left out, too (spikes.max_in_a_row)")
    assert (
        last.fix
        == "look at these rows; lower optim.lr, or raise spikes.factor or spikes.max_in_a_row where they are good"
    )
    broken = watch.trouble(8, math.nan, 1.0)
    assert broken is not None
    assert "spikes.non_finite and spikes.policy" in broken.fix, "which is left to stop"
    assert not watch.admits(8, 9.0), "nothing of it may enter the state"
    first = spikes([1.0] * 4, policy="skip").trouble(1, 9.0, 1.0)
    assert first is not None
    assert first.remedy == "skip"


def test_too_many_returns_end_the_run() -> None:
    watch = spikes([1.0] * 4, policy="roll_back", max_roll_backs=2)
    for _ in range(2):
        assert watch.trouble(9, 9.0, 1.0).remedy == "roll_back"  # type: ignore[union-attr]
        watch.went_back(Position(completed_steps=4, recent_losses=(1.0,) * 4))
    last = watch.trouble(9, 9.0, 1.0)
    assert last is not None
    assert (last.remedy, last.fix.count("spikes.max_roll_backs"), last.fix.count("policy")) == ("stop", 1, 0)


def test_a_position_remembers_all_of_it() -> None:
    watch = spikes([1.0, 2.0, 3.0, 4.0, 5.0], policy="roll_back")
    watch.leave_out(7)
    watch.went_back(Position(completed_steps=3, recent_losses=(1.0, 2.0, 3.0)))
    position = Position(completed_steps=5, **watch.remembered())
    assert position == Position.model_validate_json(position.model_dump_json())
    assert (position.skipped_steps, position.roll_backs, position.recent_losses) == ((7,), 1, (1.0, 2.0, 3.0))
    assert spikes([], position, policy="roll_back").remembered() == watch.remembered()
    assert position.updates == 5
    assert position.model_copy(update={"completed_steps": 8}).updates == 7
    assert spikes([1.0], policy="off").remembered()["recent_losses"] == ()
