"""NEFTune and label smoothing under every strategy: the same losses on any number of processes, none in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]

NOISY = {"train": {"max_steps": 3, "neftune_alpha": 15.0, "label_smoothing": 0.1}}


@pytest.fixture(scope="module")
def alone(world: Worlds) -> Callable[..., Trained]:
    @cache
    def train(text: str) -> Trained:
        return world(1).run(cells.train, text, None, 2)[0]

    return lambda base, method, **sections: train(cells.dump(cells.config(str(base), method, **sections)))


CELLS = [("fsdp2", "full"), ("zero3", "qlora")]
MORE = [
    (strategy, method)
    for strategy in ("ddp", "fsdp2", "zero1", "zero2", "zero3")
    for method in ("full", "lora", "qlora", "prompt", "prefix", "p_tuning")
    if (strategy, method) not in CELLS
]


@pytest.mark.parametrize(
    ("strategy", "method"), [*CELLS, *(pytest.param(*cell, marks=pytest.mark.ci) for cell in MORE)]
)
def test_the_losses_of_one_process_on_three(
    world: Worlds, alone: Callable[..., Trained], tiny_base: Path, strategy: str, method: str
) -> None:
    reference = alone(tiny_base, method, **NOISY)
    plain = alone(tiny_base, method, train={"max_steps": 3})
    cfg = cells.config(str(tiny_base), method, strategy, **NOISY)
    for rank in world(3).run(cells.train, cells.dump(cfg), None, 2):
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=1e-5)
        np.testing.assert_allclose(rank.eval_losses, reference.eval_losses, rtol=1e-5)
    assert abs(reference.losses[0] / plain.losses[0] - 1) > 1e-3
    assert reference.eval_losses[0] == pytest.approx(plain.eval_losses[0], rel=1e-6), "the same weights, no noise"


@pytest.mark.parametrize("what", ["neftune_alpha", "label_smoothing"])
def test_each_has_an_effect_of_its_own(alone: Callable[..., Trained], tiny_base: Path, what: str) -> None:
    only = {"train": {key: value for key, value in NOISY["train"].items() if key in ("max_steps", what)}}
    plain = alone(tiny_base, "full", train={"max_steps": 3})
    noisy = alone(tiny_base, "full", **only)
    assert abs(noisy.losses[0] / plain.losses[0] - 1) > 1e-4
    assert noisy.eval_losses[0] == pytest.approx(plain.eval_losses[0], rel=1e-6)


def test_on_ranks_that_share_sequences(world: Worlds, alone: Callable[..., Trained], tiny_base: Path) -> None:
    sections: dict[str, Any] = {"train": NOISY["train"] | {"global_batch_size": 3, "micro_batch_size": 1}}
    reference = alone(tiny_base, "full", **sections)
    sharding = {"strategy": "fsdp2", "sequence_parallel": 2}
    cfg = cells.config(str(tiny_base), "full", sharding=sharding, **sections)
    for rank in world(2).run(cells.train, cells.dump(cfg), None, 2):
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=1e-5)


def test_packed_equals_unpacked(alone: Callable[..., Trained], tiny_base: Path) -> None:
    """All rows in each step: a row has its noise whatever pack it is in."""
    every = {"train": NOISY["train"] | {"global_batch_size": 40, "micro_batch_size": 8}}
    packed = alone(tiny_base, "full", **every)
    unpacked = alone(tiny_base, "full", data={"packing": "none"}, **every)
    np.testing.assert_allclose(packed.losses, unpacked.losses, rtol=1e-5)
