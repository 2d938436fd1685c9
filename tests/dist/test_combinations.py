"""What ``docs/combinations.md`` calls supported trains, and what it calls refused ends with exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft_dist.cli import main
from sft_dist.config.load import read_config
from sft_dist.config.schema import Config
from sft_dist.config.text import write_yaml
from sft_dist.plan.combinations import AXES, Cell, Rule, cells, refusals, rules, settings_of
from tests.dist.test_parity import assert_sharded_as_described
from tests.helpers import cells as worker
from tests.helpers.cells import Trained
from tests.helpers.pairwise import pairwise
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

# What decides the losses; the other axes say how they are computed. bf16 regroups its roundings: see the parity tests.
DECIDING = ("method", "optimizer", "precision")
# States in bf16 and 8 bits are rounded by their place in a shard, and what is rounded is 2^-8 of them.
COARSE = {"bf16", "bf16, master: bf16", "adamw, bf16 states", "adamw, 8bit states"}


@cache
def table() -> dict[Cell, str | None]:
    return refusals()


@cache
def found_rules() -> list[Rule]:
    return rules(table())


def supported() -> list[Cell]:
    return [cell for cell, reason in table().items() if reason is None]


def config(cell: Cell, model: Path) -> Config:
    return read_config(settings_of(cell, str(model)), source="cell")


@pytest.fixture(scope="module")
def reference(world: World, tiny_base: Path) -> Callable[[Cell], Trained]:
    """The same run with the first value of each axis that must not change the losses, in one process."""

    @cache
    def train(text: str) -> Trained:
        return world(1).run(worker.train, text)[0]

    def of(cell: Cell) -> Trained:
        plain = tuple((axis, value if axis in DECIDING else next(iter(AXES[axis]))) for axis, value in cell)
        return train(worker.dump(config(plain, tiny_base)))

    return of


def assert_trains(cell: Cell, world: World, reference: Callable[[Cell], Trained], model: Path) -> None:
    """``train`` verifies the sharding and that parameters move."""
    cfg = config(cell, model)
    trained = world(2).run(worker.train, worker.dump(cfg))
    assert len(trained[0].losses) == 3
    for rank in trained:
        tolerance = 2e-2 if COARSE & set(dict(cell).values()) else 1e-5
        np.testing.assert_allclose(rank.losses, reference(cell).losses, rtol=tolerance, err_msg=str(cell))
    assert_sharded_as_described(cfg, trained)


def names(cell: Any) -> str:
    return "-".join(value.replace(" ", "") for _, value in cell)


@pytest.mark.ci
def test_every_two_values_that_go_together_train(
    world: World, reference: Callable[[Cell], Trained], tiny_base: Path
) -> None:
    for cell in pairwise(supported()):
        assert_trains(cell, world, reference, tiny_base)  # type: ignore[arg-type]


@pytest.mark.full
def test_everything_supported_trains(world: World, reference: Callable[[Cell], Trained], tiny_base: Path) -> None:
    for cell in supported():
        assert_trains(cell, world, reference, tiny_base)


def test_every_refusal_is_told_with_exit_code_2(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, before anything loads: one cell of each rule. The table itself is made of all cells."""
    monkeypatch.chdir(tmp_path)
    assert found_rules()
    for rule in found_rules():
        cell = next(c for c in cells() if set(rule.values) <= set(c) and table()[c] == rule.reason)
        Path("run.yaml").write_text(write_yaml(settings_of(cell, str(tiny_base))), encoding="utf-8")
        with pytest.raises(SystemExit) as caught:
            main(["config", "check", "run.yaml", "--processes", "2"])
        out, err = capsys.readouterr()
        assert (caught.value.code, out) == (2, ""), rule
        assert rule.reason in err
        assert "  fix: " in err
