"""The global batch is what the user states: neither the number of processes nor accumulation changes what is learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sft_dist.data.batch import BatchPlan
from tests.helpers import cells
from tests.helpers.cells import Trained
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

TEN = {"global_batch_size": 10, "max_steps": 4, "seed": 3}


@pytest.fixture(scope="module")
def reference(world: World, tiny_base: Path) -> Trained:
    """One process, five micro-batches of two."""
    cfg = cells.config(str(tiny_base), train={**TEN, "micro_batch_size": 2})
    trained: Trained = world(1).run(cells.train, cells.dump(cfg))[0]
    return trained


@pytest.mark.parametrize(
    ("strategy", "size", "accumulation", "micro_batch_size"),
    [
        ("ddp", 1, 1, 10), ("ddp", 1, 2, 5), ("ddp", 2, 1, 5), ("ddp", 2, 5, 1), ("ddp", 3, 1, 4), ("ddp", 3, 2, 2),
        ("fsdp2", 1, 5, 2), ("fsdp2", 2, 2, 3), ("fsdp2", 2, 5, 1), ("fsdp2", 3, 2, 2), ("zero1", 2, 5, 1),
        ("zero1", 3, 2, 2), ("zero2", 2, 5, 1), ("zero2", 3, 2, 2), ("zero3", 2, 5, 1), ("zero3", 3, 2, 2),
    ],
)  # fmt: skip
def test_ten_sequences_a_step(
    world: World,
    reference: Trained,
    tiny_base: Path,
    strategy: str,
    size: int,
    accumulation: int,
    micro_batch_size: int,
) -> None:
    """Three processes cannot share ten sequences evenly: two of them run empty micro-batches."""
    split = cells.config(str(tiny_base), "full", strategy, train={**TEN, "micro_batch_size": micro_batch_size})
    assert BatchPlan(10, micro_batch_size, size, 48).gradient_accumulation_steps == accumulation
    for rank in world(size).run(cells.train, cells.dump(split)):
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-5)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero3"])
def test_seven_rows_are_evaluated_on_three_processes(world: World, tiny_base: Path, strategy: str) -> None:
    one = cells.config(str(tiny_base), train={**TEN, "max_steps": 2})
    three = cells.config(str(tiny_base), "full", strategy, train={**TEN, "max_steps": 2})
    reference = world(1).run(cells.train, cells.dump(one), None, 1, 7)[0]
    assert len(reference.eval_losses) == 2
    for rank in world(3).run(cells.train, cells.dump(three), None, 1, 7):
        np.testing.assert_allclose(rank.eval_losses, reference.eval_losses, rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_evaluation_in_mid_training_changes_nothing(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    """Bit for bit, and its own value repeats: evaluating must neither touch a weight nor leave one gathered."""
    text = cells.dump(
        cells.config(str(tiny_base), method, strategy, train={"global_batch_size": 7, "max_steps": 3, "seed": 3})
    )
    quiet = world(2).run(cells.train, text)[0]
    watched = world(2).run(cells.train, text, None, 1)[0]
    assert watched.losses == quiet.losses
    assert watched.grad_norms == quiet.grad_norms
    assert len(set(watched.eval_losses)) == 3, "the evaluation must see the weights move"


def test_packed_equals_unpacked(world: World, tiny_base: Path) -> None:
    """The whole data set in one step: same sum of losses and same gradient, as packs and as rows."""
    rows = {"rows": 12}
    losses, norms, weights = [], [], []
    for packing, batch in ((True, 100), (False, 100)):
        cfg = cells.config(
            str(tiny_base),
            train={"global_batch_size": batch, "micro_batch_size": 1, "max_steps": 3, "seed": 3},
            optim={"type": "sgd", "lr": 0.1, "max_grad_norm": None},
        )
        result = world(1).run(cells.train, cells.dump(cfg), {**rows, "packing": packing})[0]
        losses.append(result.losses)
        norms.append(result.grad_norms)
        weights.append(result.weights)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-5)
    # Under plain SGD what the weights moved by is the sum of the gradients, element for element.
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weight, weights[1][name], rtol=1e-5, atol=1e-6, err_msg=name)
