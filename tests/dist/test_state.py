"""``state()`` is the whole truth: another process that puts it back goes on as if nothing had happened.

The state travels through files in the form a checkpoint will have: safetensors, each rank writing its own shards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.sharding.optim import learning_rate
from sft_dist.train.step import train_step
from tests.dist.test_offload import OFFLOADS
from tests.helpers import cells
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]
Numbers = list[tuple[float, float]]

STEPS = range(5)
STOP = 2


def part_of_a_run(text: str, folder: str, first: int, last: int) -> Numbers:
    """(loss, norm) of steps ``first`` to ``last``: starts from the files when first > 0, writes them when last is STOP."""
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(text)))
    data = cells.synthetic_data()
    order = TrainingOrder(data, run.batch, run.seed)
    numbers = []
    try:
        if first:
            state = strategy.state()
            dcp.load(state, storage_reader=HuggingFaceStorageReader(folder))
            strategy.load_state(state, completed_steps=first)
        for number in range(first, last):
            lr = learning_rate(run.optim, number, len(STEPS))
            out = train_step(
                strategy, data, run.batch, order.step(number), rank=dist.get_rank(), device=cells.CPU, lr=lr
            )
            numbers.append((float(out.loss), float(out.grad_norm)))
        if last == STOP:
            dcp.save(
                strategy.state(), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True)
            )
        return numbers
    finally:
        strategy.close()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    "strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero1 offload", "zero2 offload", "zero3 offload"]
)
def test_resumed_equals_uninterrupted(
    world: World, tiny_base: Path, tmp_path: Path, strategy: str, method: str
) -> None:
    """Bit for bit on the same strategy and world; to 1e-5 on another strategy and fewer processes."""
    strategy, _, offload = strategy.partition(" ")
    sharding = {"strategy": strategy} | ({"deepspeed_config": OFFLOADS[strategy]} if offload else {})
    text = cells.dump(cells.config(str(tiny_base), method, strategy, sharding=sharding))
    whole: Numbers = world(2).run(part_of_a_run, text, "", 0, len(STEPS))[0]
    before: Numbers = world(2).run(part_of_a_run, text, str(tmp_path), 0, STOP)[0]
    for rank in world(2).run(part_of_a_run, text, str(tmp_path), STOP, len(STEPS)):
        assert before + rank == whole
    other = cells.dump(cells.config(str(tiny_base), method, "ddp" if strategy == "fsdp2" else "fsdp2"))
    np.testing.assert_allclose(
        world(1).run(part_of_a_run, other, str(tmp_path), STOP, len(STEPS))[0], whole[STOP:], rtol=1e-5
    )


@pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
def test_momentum_of_sgd_is_part_of_it(world: World, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    optim = {"type": "sgd", "lr": 0.3, "momentum": 0.9}
    text = cells.dump(cells.config(str(tiny_base), "full", strategy, optim=optim))
    whole: Numbers = world(2).run(part_of_a_run, text, "", 0, len(STEPS))[0]
    before: Numbers = world(2).run(part_of_a_run, text, str(tmp_path), 0, STOP)[0]
    assert before + world(2).run(part_of_a_run, text, str(tmp_path), STOP, len(STEPS))[0] == whole


@pytest.mark.parametrize("strategy", ["fsdp2", "zero1", "zero2", "zero3"])
def test_to_three_processes_and_back(world: World, tiny_base: Path, tmp_path: Path, strategy: str) -> None:
    """Three divides no dimension: partitions are padded, and the padding must not travel."""
    text = cells.dump(cells.config(str(tiny_base), "full", strategy))
    whole: Numbers = world(2).run(part_of_a_run, text, "", 0, len(STEPS))[0]
    world(2).run(part_of_a_run, text, str(tmp_path / "two"), 0, STOP)
    up = world(3).run(part_of_a_run, text, str(tmp_path / "two"), STOP, len(STEPS))[0]
    world(3).run(part_of_a_run, text, str(tmp_path / "three"), 0, STOP)
    down = world(2).run(part_of_a_run, text, str(tmp_path / "three"), STOP, len(STEPS))[0]
    np.testing.assert_allclose(up, whole[STOP:], rtol=1e-5)
    np.testing.assert_allclose(down, whole[STOP:], rtol=1e-5)
