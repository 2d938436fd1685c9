"""``train.compile`` under every strategy: the losses of a run without it, and the same bits after a stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from sft_dist.config.schema import Config
from sft_dist.model.compiled import COMPILED
from tests.dist.test_resume import STOP, checkpoint, config, final_bytes, run_part
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

STEPS = {"max_steps": 3}


@pytest.fixture(scope="module")
def plain(world: Worlds, tiny_base: Path) -> Callable[[str], Trained]:
    @cache
    def train(method: str) -> Trained:
        return world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), method, train=STEPS)), None, 2)[0]

    return train


CELLS = [("fsdp2", "full"), ("zero3", "qlora")]
MORE = [
    (strategy, method)
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for method in ("full", "lora")
    if (strategy, method) not in CELLS
]


@pytest.mark.parametrize(
    ("strategy", "method"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.ci) for cell in MORE)]
)
def test_the_losses_of_a_run_without_it(
    world: Worlds, plain: Callable[[str], Trained], tiny_base: Path, strategy: str, method: str
) -> None:
    reference = plain(method)
    cfg = cells.config(str(tiny_base), method, strategy, train=STEPS | {"compile": True})
    for rank in world(3).run(cells.train, cells.dump(cfg), None, 2):
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=1e-5)
        np.testing.assert_allclose(rank.eval_losses, reference.eval_losses, rtol=1e-5)


def arithmetics(cfg_yaml: str) -> list[bool]:
    """Of every fused module, whether it is compiled."""
    _, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    found = [getattr(type(module), "arithmetic", None) for module in strategy.model.modules()]
    return [each is COMPILED for each in found if each is not None]


def test_every_norm_gate_and_attention_is_compiled_where_it_is_asked_for(world: Worlds, tiny_base: Path) -> None:
    """Of two layers, with the last norm."""
    for value in (True, False):
        cfg = cells.config(str(tiny_base), "lora", "fsdp2", train={"compile": value})
        assert world(2).run(arithmetics, cells.dump(cfg)) == [[value] * 9] * 2


@pytest.mark.parametrize("mode", ["full", pytest.param("selective", marks=pytest.mark.ci)])
def test_resumed_equals_uninterrupted(world: Worlds, tiny_base: Path, tmp_path: Path, mode: str) -> None:
    """In new processes, whose first batch is another one."""
    sections = {"activation_checkpointing": {"mode": mode}, "precision": {"compute": "bf16"}}
    first, again = (
        config(tiny_base, tmp_path / name, "full", "fsdp2", compiled=True, **sections) for name in ("a", "b")
    )
    whole = world(2).run(run_part, first, None)
    with closing(WorldPool(2)) as fresh:
        resumed = fresh.run(run_part, again, checkpoint(tmp_path / "a"))
    assert resumed[0].metrics == whole[0].metrics[STOP:]
    assert final_bytes(tmp_path / "b") == final_bytes(tmp_path / "a") != {}
