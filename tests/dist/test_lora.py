"""The fused LoRA layer under strategies that gather and cast: it reads what the modules inside it own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from torch import nn

from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.train.step import train_step
from tests.helpers import cells
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

BF16 = {"precision": {"compute": "bf16", "master": "fp32", "reduce": "fp32"}}


def found_by_deepspeed(cfg_yaml: str) -> tuple[int, int]:
    """One step; how many parameters DeepSpeed found read outside their module, and how many it gathers for readers.

    One that it finds it gathers there and then, while all ranks wait, and not ahead.
    """
    from deepspeed.runtime.zero import parameter_offload

    found: list[nn.Parameter] = []
    original = parameter_offload.register_external_parameter

    def register(module: nn.Module, parameter: nn.Parameter) -> None:
        found.append(parameter)
        original(module, parameter)

    run, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    parameter_offload.register_external_parameter = register
    try:
        data = cells.synthetic_data()
        step = TrainingOrder(data, run.batch, run.seed).step(0)
        train_step(strategy, data, run.batch, step, rank=dist.get_rank(), device=cells.CPU, lr=1e-3)
        declared = sum(len(list(m.ds_external_parameters())) for m in strategy.model.modules())
        return len(found), declared
    finally:
        parameter_offload.register_external_parameter = original
        strategy.close()


def test_zero3_is_told_what_a_layer_reads(world: World, tiny_base: Path) -> None:
    cfg = cells.config(str(tiny_base), "qlora", "zero3")
    # Two blocks of seven layers, each with its base weight, A and B.
    assert world(2).run(found_by_deepspeed, cells.dump(cfg)) == [(0, 2 * 7 * 3)] * 2


@pytest.mark.parametrize(("strategy", "method"), [("ddp", "qlora"), ("fsdp2", "lora"), ("zero3", "qlora")])
def test_adapters_in_bf16_stay_near_one_process(world: World, tiny_base: Path, strategy: str, method: str) -> None:
    """Regrouped micro-batches regroup the roundings of bf16; the bounds are those of the whole model in bf16."""
    cfg = cells.config(str(tiny_base), method, strategy, **BF16)
    trained = world(2).run(cells.train, cells.dump(cfg))
    reference = world(1).run(cells.train, cells.dump(cells.config(str(tiny_base), method, "ddp", **BF16)))[0]
    for rank in trained:
        np.testing.assert_allclose(rank.losses, reference.losses, rtol=1e-2)
        np.testing.assert_allclose(rank.grad_norms, reference.grad_norms, rtol=5e-2)
    assert reference.losses[-1] < reference.losses[0]
