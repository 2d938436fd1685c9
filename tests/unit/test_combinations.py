"""The page of what goes together is what the checks say, and the rules on it explain every refusal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.plan import combinations
from sft_dist.plan.check import check
from sft_dist.plan.combinations import Cell, Rule, cells, page, rules
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.refusal import Refusal
from tests.helpers.cells import config
from tests.helpers.pairwise import pairwise

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_checks_say() -> None:
    written = (ROOT / "docs/combinations.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m sft_dist.plan.combinations > docs/combinations.md"


@pytest.fixture
def three_axes(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    monkeypatch.setattr(combinations, "AXES", {axis: {"0": {}, "1": {}, "2": {}} for axis in "abc"})
    return combinations.cells()


def test_rules_are_the_smallest_and_no_consequences(three_axes: list[Cell]) -> None:
    def reason(cell: Cell) -> str | None:
        a, b, c = (value for _, value in cell)
        if a == "2":
            return "a2 alone"
        if (a, b) == ("0", "0"):
            return "a0 b0"
        if b == "1" and c == "1":
            return "b1 c1"
        if (a, b, c) == ("1", "2", "2"):
            return "all three"
        return None

    assert rules({cell: reason(cell) for cell in three_axes}) == [
        Rule((("a", "2"),), "a2 alone"),
        Rule((("a", "0"), ("b", "0")), "a0 b0"),
        Rule((("b", "1"), ("c", "1")), "b1 c1"),
        Rule((("a", "1"), ("b", "2"), ("c", "2")), "all three"),
    ]


def test_what_is_left_over_is_no_rule(three_axes: list[Cell]) -> None:
    """b0 goes with a2 alone, and a2 not with c0: b0 with c0 is refused, which needs no line of its own."""
    table = {
        cell: "first"
        if cell[1][1] == "0" and cell[0][1] != "2"
        else "second"
        if (cell[0][1], cell[2][1]) == ("2", "0")
        else None
        for cell in three_axes
    }
    found = [rule.values for rule in rules(table)]
    assert found == [(("a", "0"), ("b", "0")), (("a", "1"), ("b", "0")), (("a", "2"), ("c", "0"))]


def test_pairwise_meets_every_pair_with_few() -> None:
    every = cells()
    some = pairwise(every)
    pairs = {pair for cell in every for pair in itertools.combinations(cell, 2)}
    assert {pair for cell in some for pair in itertools.combinations(cell, 2)} == pairs
    assert len(some) < len(every) / 5


def test_where_auto_must_not_go_is_told(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device's memory will decide is not known yet: one of the ways may end in a refusal after all."""
    auto = config(str(tiny_base), "lora", "auto", activation_checkpointing={"mode": "auto"})
    assert [run.strategy for run in check(auto, WorldShape(1, 2)).runs] == ["ddp"] * 3 + ["fsdp2"] * 3
    assert check(auto, WorldShape(1, 2)).notes == []
    monkeypatch.setattr(
        registry, "unsupported", lambda run: Refusal("not so", "try") if run.strategy == "fsdp2" else None
    )
    checked = check(auto, WorldShape(1, 2))
    modes = ["none", "selective", "full"]
    assert [run.activation_checkpointing.mode for run in checked.runs] == modes
    assert checked.notes == [
        f"auto must not become fsdp2 with activation_checkpointing.mode {mode}: not so" for mode in modes
    ]
    monkeypatch.setattr(
        registry,
        "unsupported",
        lambda run: Refusal("not so", "try") if run.activation_checkpointing.mode == "none" else None,
    )
    checked = check(auto, WorldShape(1, 2))
    assert [run.activation_checkpointing.mode for run in checked.runs] == modes[1:] * 2
    assert checked.notes == [
        f"auto will not become {strategy} with activation_checkpointing.mode none: not so"
        for strategy in ("ddp", "fsdp2")
    ]
    monkeypatch.setattr(registry, "unsupported", lambda run: Refusal(f"not under {run.strategy}", "try"))
    with pytest.raises(ConfigError, match=r"^not under ddp"):
        check(auto, WorldShape(1, 2))


def test_open_micro_batches_are_checked_as_the_smallest(tiny_base: Path) -> None:
    """More than one sequence is taken only where it goes with the rest."""
    open_size = config(str(tiny_base), train={"micro_batch_size": "auto"})
    assert [run.batch.micro_batch_size for run in check(open_size, WorldShape(1, 2)).runs] == [1]
