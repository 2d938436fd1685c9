"""What a rehearsal projects, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft_dist.plan.bill import HourlyPrice
from sft_dist.plan.expected import Expected
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.outlook import Outlook
from sft_dist.train.rehearsal_report import Measured, Saving, due, projections, table
from tests.helpers import cells

MEASURED = Measured(
    step_s=2.0, step_tokens=100, beside_s=2.5, tokens=9000.0, steps=90, evaluations=3, saves=9, evaluation_s=4.0,
    saving=Saving(num_bytes=50, blocked_s=1.0, written_s=5.0), final_s=30.0, peak_bytes=None,
)  # fmt: skip


def test_what_is_due() -> None:
    assert due(3, 0, first=0, last=7) == len([3, 6, 7])
    assert due(None, 3, first=2, last=7) == len([3, 6, 7])
    assert due(4, 3, first=0, last=12) == len([3, 4, 6, 8, 9, 12])
    assert due(None, 0, first=6, last=7) == 1


def test_a_save_waits_for_the_one_before() -> None:
    saving = MEASURED.saving
    assert saving.bytes_per_s == 10
    assert saving.waits_s(20.0) == 1.0
    # After a second of waiting and three of steps, one of writing is left.
    assert saving.waits_s(3.0) == 2.0
    assert Saving(50, blocked_s=5.0, written_s=5.0).waits_s(3.0) == 5.0, "not asynchronous"


def test_the_whole_run() -> None:
    assert MEASURED.steps_s == 180
    assert MEASURED.saving_s(None) == 9 * 1.0
    # One every 6 seconds is 30 of them.
    assert MEASURED.saving_s(0.1) == 30 * 1.0
    assert MEASURED.total_s(None) == 180 + 3 * 4 + 9 + 30


def test_beside_the_plan(tiny_base: Path) -> None:
    run = resolve(cells.config(str(tiny_base)), WorldShape())
    expected = Expected(1, 90, 9000, 3, 9, 1, 1, step_s=1.0, total_s=200.0)
    outlook = Outlook(None, expected, HourlyPrice(3600.0, 150.0, "your price"))
    rows = {row.name: row for row in projections(run, MEASURED, outlook)}
    assert (rows["a step"].planned, rows["a step"].measured) == ("1.00 s", "2.00 s")
    assert rows["saving"].measured == "5%"
    assert rows["saving"].note.endswith("a step beside one takes 25% longer")
    assert (rows["in all"].planned, rows["in all"].measured) == ("3 min", "4 min")
    assert (rows["bill"].planned, rows["bill"].measured) == ("$200.00 (¥30,000)", "$231.00 (¥34,650)")
    assert "peak of memory" not in rows, "a CPU counts other things too"
    assert {figures.cell_len for figures, _ in table(list(rows.values()))} == {4 + 20 + 17 + 2 + 17}
    unplanned = projections(run, MEASURED, Outlook(None, None, None))
    assert "planned" not in table(unplanned)[0][0].plain
    assert [row.name for row in unplanned] == ["a step", "an evaluation", "saving", "in all"]


@pytest.mark.parametrize("slower", [2.0, 1.9])
def test_no_step_is_slower(tiny_base: Path, slower: float) -> None:
    run = resolve(cells.config(str(tiny_base)), WorldShape())
    measured = Measured(**{**vars(MEASURED), "beside_s": slower})
    (saving,) = (row for row in projections(run, measured, Outlook(None, None, None)) if row.name == "saving")
    assert saving.note.endswith("no step takes longer beside one")
