"""Which losses are troubles, and what is done about them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.checkpoint.manifest import Position
from sft_dist.config.spikes_schema import SpikesConfig
from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import Step
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.train.culprit import MAX_NAMED_ROWS, Culprit, Seen, culprit_of, described, keep
from sft_dist.train.spikes import Spikes, Trouble

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
        assert str(trouble).startswith(f"loss {loss:g} is a spike, 3.0 times the median")
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


def test_half_of_an_odd_window_is_its_larger_half() -> None:
    assert spikes([1.0, 1.0], window=5).trouble(3, 9.0, 1.0) is None
    assert spikes([1.0, 1.0, 1.0], window=5).trouble(4, 9.0, 1.0) is not None


@pytest.mark.parametrize("key", ["policy", "non_finite"])
def test_what_either_rule_asks_for_is_made_ready(key: str) -> None:
    for remedy, waits, may_go_back in (("skip", True, False), ("roll_back", False, True)):
        watch = spikes([], **{key: remedy})
        assert (watch.waits, watch.may_go_back) == (waits, may_go_back)


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


# Which rank, micro-batch and rows it was

# The last row has most of the answers.
ROWS = PreparedData.of([([n, n + 10, n + 20, n + 30], [0, 0, 1, 1]) for n in range(3)] + [([9] * 40, [0] + [1] * 39)])


def culprit(trouble: str, first: list[float], second: list[float], *, parameters: tuple[str, ...] = ()) -> Culprit:
    """Of step 7, with rows 3, 1, 2, 0: rank 0 has 3 and 2, rank 1 has 1 and 0."""
    remedy: Any = "warn" if trouble == "spike" else "stop"
    found = Trouble(7, trouble, 5.0, None, 1.5, remedy)  # type: ignore[arg-type]
    plan = BatchPlan(global_batch_size=4, micro_batch_size=1, world_size=2, max_seq_len=48)
    step = Step(epoch=1, sequences=np.array([3, 1, 2, 0]), num_tokens=52, supervised_tokens=45)
    seen = [Seen(first, list(parameters), "n1"), Seen(second, [*parameters, "b"], "n2")]
    return culprit_of(found, ROWS, plan, step, 1e-4, seen)


def test_a_spike_is_of_the_rank_and_row_with_the_largest_loss_of_a_token() -> None:
    found = culprit("spike", [78.0, 3.0], [4.0, 10.0])
    assert [each.loss for each in found.micro_batches] == [2.0, 1.5, 2.0, 5.0]
    assert (found.worst.rank, found.worst.number, found.worst.sequences) == (1, 1, (0,))
    assert found.ranks == [1]
    assert described(found, ROWS) == "seen by rank 1 on n2, first in row 0"


def test_what_is_no_number_is_of_all_ranks_that_saw_it(tmp_path: Path) -> None:
    found = culprit("non_finite", [99.0, math.nan], [-math.inf, 1.0], parameters=("a",))
    assert (found.ranks, found.parameters) == ([0, 1], ("a", "b"))
    assert described(found, ROWS) == "seen by rank 0 on n1, rank 1 on n2, first in row 2"
    assert described(culprit("non_finite", [1.0, 1.0], [1.0, 1.0]), ROWS) == (
        "every loss is finite, the gradient is not, b first"
    )
    place = keep(found, ROWS, lambda ids: " ".join(map(str, ids)), tmp_path)
    about = json.loads((place / "about.json").read_text())
    assert (place.name, about["step"], about["epoch"], about["median_loss"], about["lr"]) == (
        "step-00000007", 7, 1, 1.5, 1e-4
    )  # fmt: skip
    assert about["largest_loss"] == {
        "rank": 0, "micro_batch": 1, "sequences": [2], "loss_sum": "nan", "loss": "nan", "rows": ["row 2"]
    }  # fmt: skip
    batch = [json.loads(line) for line in (place / "batch.jsonl").read_text().splitlines()]
    assert [(each["sequence"], each["rank"], each["micro_batch"]) for each in batch] == [
        (3, 0, 0), (2, 0, 1), (1, 1, 0), (0, 1, 1)
    ]  # fmt: skip
    assert batch[1]["rows"] == [
        {"row": 2, "origin": "row 2", "input_ids": [2, 12, 22, 32], "supervised": [[2, 4]], "text": "2 12 22 32",
         "supervised_text": ["22 32"]}
    ]  # fmt: skip


def test_of_many_rows_the_first_are_named() -> None:
    number = MAX_NAMED_ROWS + 2
    packs = Packs(np.arange(number), np.array([0, number]))
    data = PreparedData.of([([1, 2], [0, 1])] * number, packs)
    plan = BatchPlan(global_batch_size=1, micro_batch_size=1, world_size=1, max_seq_len=48)
    step = Step(epoch=0, sequences=np.array([0]), num_tokens=14, supervised_tokens=7)
    found = culprit_of(Trouble(1, "spike", 5.0, None, 1.0, "warn"), data, plan, step, 1e-4, [Seen([35.0], [], "n1")])
    assert described(found, data) == "seen by rank 0 on n1, first in row 0, row 1 and 2 more"
