"""Virtual tokens under every strategy: the losses of one process, sharded as described, and they learn.

A cell is as in ``test_parity``, on rows that are not packed. Five virtual tokens divide by neither 2 nor 3 ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from sft_dist.config.schema import Config
from tests.dist.test_parity import assert_equal_runs, assert_sharded_as_described
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

pytestmark = pytest.mark.ci

# Prompts start far from where embeddings are: small steps would show nothing.
LEARNING = {"optim": {"lr": 0.1, "max_grad_norm": 0.5, "weight_decay": 0.1, "warmup_ratio": 0.2}}

METHODS = ("prompt", "prompt text", "p_tuning", "p_tuning lstm", "prefix", "prefix projection")
SAMPLED = {
    "prompt: ddp x2", "prompt text: zero3 x2", "prompt: fsdp2 x3", "p_tuning: fsdp2 x2", "p_tuning lstm: ddp x2",
    "p_tuning lstm: fsdp2 x3", "p_tuning: zero3 x2", "prefix: fsdp2 x2", "prefix: zero3 x3", "prefix projection: ddp x2",
    "prefix projection: zero2 x2",
}  # fmt: skip
CELLS = [
    f"{method}: {strategy} x{ranks}"
    for method in METHODS
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for ranks in (2, 3)
]


def learning(base: Path, method: str, strategy: str) -> Config:
    return cells.config(str(base), method, strategy, **LEARNING)


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[[Config], Trained]:
    """The same run in one process, trained once for all cells that compare with it."""

    @cache
    def train(text: str) -> Trained:
        return world(1).run(cells.train, text)[0]

    return lambda cfg: train(cells.dump(cfg))


@pytest.mark.parametrize(
    "cell", [cell if cell in SAMPLED else pytest.param(cell, marks=pytest.mark.full) for cell in CELLS]
)
def test_several_processes_equal_one(
    world: World, alone: Callable[[Config], Trained], tiny_base: Path, cell: str
) -> None:
    method, place = cell.split(": ")
    strategy, ranks = place.split(" x")
    cfg = learning(tiny_base, method, strategy)
    trained = world(int(ranks)).run(cells.train, cells.dump(cfg))
    reference = alone(learning(tiny_base, method, "ddp"))
    assert_equal_runs(trained, reference)
    assert_sharded_as_described(cfg, trained)
    assert {name for name, (_, _, trains) in trained[0].local.items() if trains} == reference.weights.keys()
    assert all(name.startswith("prompt.encoder.") for name in reference.weights)
    for name, weight in reference.weights.items():
        np.testing.assert_allclose(trained[0].weights[name], weight, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("method", ["p_tuning lstm", "prefix"])
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero1", marks=pytest.mark.ci)])
def test_bf16_stays_near_one_process(
    world: World, alone: Callable[[Config], Trained], tiny_base: Path, method: str, strategy: str
) -> None:
    """As ``test_parity`` bounds it: the encoder's casts among those that regrouping regroups."""
    precision = {"compute": "bf16", "master": "fp32"}
    cfg = cells.config(str(tiny_base), method, strategy, precision=precision, **LEARNING)
    trained = world(2).run(cells.train, cells.dump(cfg))
    reference = alone(cells.config(str(tiny_base), method, "ddp", precision=precision, **LEARNING))
    np.testing.assert_allclose(trained[0].losses, reference.losses, rtol=1e-2)
    assert_sharded_as_described(cfg, trained)


@pytest.mark.parametrize("method", ["prompt", "p_tuning", "prefix"])
def test_they_learn(world: World, tiny_base: Path, method: str) -> None:
    """The rows that they are trained on, on a model of random weights that stays what it is."""
    train = {"global_batch_size": 14, "micro_batch_size": 14, "max_steps": 31}
    cfg = cells.config(
        str(tiny_base), method, "ddp", train=train, activation_checkpointing={"mode": "none"}, **LEARNING
    )
    (trained,) = world(1).run(cells.train, cells.dump(cfg), {"rows": 14, "seed": 99}, 30, 14)
    before, after = trained.eval_losses
    assert after < 0.95 * before
