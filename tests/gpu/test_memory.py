"""What saves memory and needs CUDA to show it: bitsandbytes' kernels, managed and pinned memory.

Skipped without a CUDA device. Run with ``pytest tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device: managed memory and pinned copies have no CPU form", allow_module_level=True)

import bitsandbytes
from torch import Tensor, nn

from sft_dist.config.schema import AdamWConfig, OptimConfig
from sft_dist.run import Precision
from sft_dist.sharding.adamw import BlockwiseAdamW
from sft_dist.sharding.optim import build_optimizer
from tests.gpu.test_smoke import group, losses  # noqa: F401  a fixture

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
CONFIG = AdamWConfig(weight_decay=0.1)


def tensors(seed: int, device: torch.device) -> list[Tensor]:
    """One of 8 bits, one below bitsandbytes' 4,096 elements; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device) for shape in ((512, 384), (40, 3))]


def built(config: OptimConfig, state: Any, device: torch.device) -> torch.optim.Optimizer:
    named = [(str(i), nn.Parameter(t)) for i, t in enumerate(tensors(0, device))]
    return build_optimizer(config, Precision("fp32", "fp32", "fp32", state), named)


def trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for part in optimizer.param_groups for p in part["params"]]
    for step in range(5):
        for parameter, grad in zip(parameters, tensors(100 + step, parameters[0].device), strict=True):
            parameter.grad = grad
        optimizer.step()
    return [p.detach().cpu() for p in parameters]


def test_8bit_is_bitsandbytes_own() -> None:
    groups = [{"params": [nn.Parameter(t) for t in tensors(0, CUDA)], "weight_decay": 0.1}]
    reference = bitsandbytes.optim.AdamW8bit(groups, lr=CONFIG.lr)
    for got, want in zip(trained(built(CONFIG, "8bit", CUDA)), trained(reference), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
def test_paged_moments_are_managed_and_the_same(state: Any) -> None:
    paged = built(CONFIG.model_copy(update={"paged": True}), state, CUDA)
    plain = BlockwiseAdamW(
        [{"params": [nn.Parameter(t) for t in tensors(0, CUDA)], "weight_decay": 0.1}],
        lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, bits=8 if state == "8bit" else 32, paged=False,
    )  # fmt: skip
    for got, want in zip(trained(paged), trained(plain), strict=True):
        assert torch.equal(got, want)
    for theirs, ours in zip(plain.state.values(), paged.state.values(), strict=True):
        assert ours["exp_avg"].is_paged
        assert torch.equal(theirs["exp_avg"].cpu(), ours["exp_avg"])


def test_stochastic_rounding_is_the_cpus() -> None:
    """The same chance on both, so that only products that differ in the last bit may round otherwise."""
    optimizers = [built(CONFIG, "bf16", device) for device in (CUDA, torch.device("cpu"))]
    on_gpu, on_cpu = (trained(optimizer) for optimizer in optimizers)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-4, atol=1e-6)
    states = [next(iter(optimizer.state.values()))["exp_avg_sq"].cpu() for optimizer in optimizers]
    assert (states[0] != states[1]).float().mean() < 1e-3


@pytest.mark.parametrize("method", ["full", "qlora"])
@pytest.mark.parametrize(
    "sections",
    [
        {"sharding": {"strategy": "fsdp2", "cpu_offload": True}},
        {"activation_checkpointing": {"mode": "selective", "offload": True}},
    ],
)
def test_the_same_losses(tiny_base: Path, method: str, sections: dict[str, Any]) -> None:
    expected = losses(tiny_base, method, "fsdp2", "fp32")
    got = losses(tiny_base, method, "fsdp2", "fp32", **sections)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("state", "paged"), [("8bit", False), ("8bit", True), ("fp32", True), ("bf16", False)])
def test_few_bits_and_pages_train(tiny_base: Path, strategy: str, state: str, paged: bool) -> None:
    optim = {"type": "adamw", "lr": 3e-3, "paged": paged}
    got = losses(tiny_base, "full", strategy, "bf16", precision={"optimizer_state": state}, optim=optim)
    assert got[-1] < got[0]
