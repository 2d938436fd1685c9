"""The learning rate as a function of the step, and which parameters the optimizer updates and decays."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sft_dist.config.schema import AdamWConfig, OptimConfig, SgdConfig
from sft_dist.errors import ConfigError
from sft_dist.resolve import resolve
from sft_dist.run import Precision
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.optim import build_optimizer, learning_rate
from tests.helpers import cells

FP32 = Precision(compute="fp32", master="fp32", reduce="fp32", optimizer_state="fp32")


def rates(config: OptimConfig, num_steps: int) -> list[float]:
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak() -> None:
    for schedule in ("cosine", "linear", "constant"):
        config = AdamWConfig(lr=1.0, schedule=schedule, warmup_ratio=0.4)
        assert rates(config, 10)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine() -> None:
    got = rates(AdamWConfig(lr=2.0, schedule="cosine", warmup_ratio=0.2), 10)
    expected = [1.0, 2.0] + [1 + math.cos(math.pi * k / 8) for k in range(8)]
    assert got == pytest.approx(expected)
    assert got[6] == pytest.approx(1.0)  # half way


def test_linear() -> None:
    got = rates(AdamWConfig(lr=2.0, schedule="linear", warmup_ratio=0.2), 10)
    assert got == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25])


def test_constant() -> None:
    assert rates(AdamWConfig(lr=2.0, schedule="constant", warmup_ratio=0.2), 5) == pytest.approx([2.0] * 5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_decay_would_reach_zero_after_the_last_step(schedule: Any) -> None:
    config = AdamWConfig(lr=2.0, schedule=schedule, warmup_ratio=0.03)
    assert learning_rate(config, 99, 100) > 0
    assert learning_rate(config, 100, 100) == pytest.approx(0, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(AdamWConfig(lr=2.0, warmup_ratio=0.0), 0, 100) == 2.0


def test_any_warm_up_takes_at_least_a_step() -> None:
    got = rates(AdamWConfig(lr=2.0, warmup_ratio=0.03), 50)
    assert got[0] == pytest.approx(1.0)
    assert got[1] == got[2] == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_single_step_moves(schedule: Any) -> None:
    for warmup in (0.0, 0.03, 0.99):
        assert learning_rate(AdamWConfig(lr=2.0, schedule=schedule, warmup_ratio=warmup), 0, 1) == 2.0


# Groups


class Mixed(nn.Module):
    """A frozen and a trainable matrix, a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.linear = nn.Linear(4, 2)
        self.norm = nn.LayerNorm(2, bias=False)


def groups_by_name(config: OptimConfig, model: nn.Module) -> list[tuple[set[str], float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = build_optimizer(config, FP32, model.named_parameters())
    return [({names[id(p)] for p in group["params"]}, group["weight_decay"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("config", [AdamWConfig(weight_decay=0.1), SgdConfig(type="sgd", weight_decay=0.1)])
def test_matrices_decay_and_norms_and_biases_do_not(config: OptimConfig) -> None:
    assert groups_by_name(config, Mixed()) == [({"linear.weight"}, 0.1), ({"linear.bias", "norm.weight"}, 0.0)]


def test_names_without_decay() -> None:
    config = AdamWConfig(weight_decay=0.1, no_decay=["b", "re:c.*x"])
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("a", "b", "bb", "cx", "cy")})
    assert groups_by_name(config, model) == [
        ({"a.weight", "bb.weight", "cx.weight", "cy.weight"}, 0.1), ({"b.weight"}, 0.0)
    ]  # fmt: skip
    whole = AdamWConfig(weight_decay=0.1, no_decay=["b", "re:c.*"])
    assert groups_by_name(whole, model)[1] == ({"b.weight", "cx.weight", "cy.weight"}, 0.0)


@pytest.mark.parametrize("name", ["norm", "lm_heads"])
def test_a_name_without_decay_that_changes_nothing_is_refused(tiny_base: Path, name: str) -> None:
    """No parameter is called so; or it has no decay in any case."""
    cfg = cells.config(str(tiny_base), optim={"no_decay": ["lm_head", name]})
    with pytest.raises(ConfigError) as caught:
        resolve(cfg, WorldShape(1, 2))
    assert caught.value.what == f"optim.no_decay: the model has no trained matrix named {name}"
    assert "embed_tokens" in caught.value.fix


def test_frozen_parameters_are_not_the_optimizers() -> None:
    names = {name for group, _ in groups_by_name(AdamWConfig(weight_decay=0.1), Mixed()) for name in group}
    assert "frozen.weight" not in names


def test_matrices_alone_make_one_group() -> None:
    assert groups_by_name(AdamWConfig(weight_decay=0.1), nn.Linear(2, 2, bias=False)) == [({"weight"}, 0.1)]


def test_vectors_alone_make_one_group() -> None:
    assert groups_by_name(AdamWConfig(weight_decay=0.1), nn.LayerNorm(2)) == [({"weight", "bias"}, 0.0)]


def test_a_parameter_that_zero3_emptied_is_judged_by_its_true_shape() -> None:
    matrix, vector = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))
    matrix.ds_shape, vector.ds_shape = torch.Size([4, 4]), torch.Size([4])  # type: ignore[attr-defined]
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.1), FP32, [("a", matrix), ("b", vector)])
    assert [(g["params"][0] is matrix, g["weight_decay"]) for g in optimizer.param_groups] == [
        (True, 0.1),
        (False, 0.0),
    ]


def test_adamw_gets_its_constants() -> None:
    config = AdamWConfig(lr=0.5, beta1=0.8, beta2=0.7, eps=1e-3)
    optimizer = build_optimizer(config, FP32, nn.Linear(2, 2).named_parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.5, (0.8, 0.7), 1e-3, True)


def test_sgd_gets_its_constants() -> None:
    config = SgdConfig(type="sgd", lr=0.5, momentum=0.3)
    optimizer = build_optimizer(config, FP32, nn.Linear(2, 2).named_parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"]) == (0.5, 0.3)
        assert group["fused"] or group["foreach"]  # not one kernel a parameter


def test_one_adamw_step_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    config = AdamWConfig(lr=0.1, weight_decay=0.5, beta1=0.9, beta2=0.99, eps=1e-8)
    optimizer = build_optimizer(config, FP32, [("w", weight)])
    weight.grad = torch.tensor([[3.0, -4.0]])
    optimizer.step()
    # Decoupled decay, then lr * m / sqrt(v), which is the gradient's sign in the first step.
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), expected)
