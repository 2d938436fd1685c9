"""How long the host takes to ask a GPU for a step's work, measured without one: the figures of ``plan/launches.py``.

    OMP_NUM_THREADS=1 python -m benchmarks.host_time

A model whose tensors hold a few numbers does everything that a large one does but compute: Python, the dispatcher and
autograd. Sharded units of one tiny layer in a process group that sends nothing do everything but communicate. What CUDA
adds to an operator, starting its kernel, is not in these figures.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_parts.machine import cpu_name

LAYERS, UNITS, TENSORS, REPEATS = 8, 16, 256, 150


class _Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


class Leaf(nn.Module):
    """What is sharded as one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"on {cpu_name()}, torch {torch.__version__}")
    print(f"an operator of a decoder layer, forward and backward: {operator_s() * 1e6:.1f} us")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    for name, shard in (("FSDP1", _fsdp1), ("FSDP2", _fsdp2)):
        forward, backward = unit_s(shard)
        print(f"a unit of {name}: {forward * 1e6:.0f} us forward, {backward * 1e6:.0f} us backward")
    dist.destroy_process_group()
    for name, fused in (("foreach", False), ("fused", True)):
        print(f"a tensor in the norm and AdamW ({name}): {update_s(fused=fused) * 1e6:.1f} us")


def operator_s() -> float:
    """Seconds of an operator that reaches the dispatcher, views included; modules and autograd are spread over them."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = torch.zeros(1, 8, dtype=torch.int64)

    def step() -> None:
        model(input_ids=ids).logits.sum().backward()

    with _Operators() as operators:
        step()
    return _seconds(step) / operators.count


def unit_s(shard: Callable[[nn.Sequential], nn.Module]) -> tuple[float, float]:
    """Seconds of a sharded unit in forward and in backward, beyond those of its module."""
    found = []
    for wrap in (lambda model: model, shard):
        model = wrap(nn.Sequential(*(Leaf() for _ in range(UNITS))))
        x = torch.zeros(2, 16, requires_grad=True)
        forward = _seconds(lambda model=model, x=x: model(x))
        both = _seconds(lambda model=model, x=x: model(x).sum().backward())
        found.append((forward / UNITS, (both - forward) / UNITS))
    (plain_forward, plain_backward), (forward, backward) = found
    return forward - plain_forward, backward - plain_backward


def _fsdp1(model: nn.Sequential) -> nn.Module:
    return FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({Leaf})
    )


def _fsdp2(model: nn.Sequential) -> nn.Module:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for leaf in model:
        fully_shard(leaf, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def update_s(*, fused: bool) -> float:
    """Seconds of one tensor in clipping and in the optimizer's step."""
    tensors = [nn.Parameter(torch.zeros(16)) for _ in range(TENSORS)]
    for tensor in tensors:
        tensor.grad = torch.zeros(16)
    optimizer = torch.optim.AdamW(tensors, fused=fused, foreach=not fused)

    def update() -> None:
        nn.utils.clip_grad_norm_(tensors, 1.0)
        optimizer.step()

    return _seconds(update) / TENSORS


def _seconds(run: Callable[[], object]) -> float:
    """Of the processor, the least of many: what else it runs is not counted."""
    times = []
    for _ in range(REPEATS):
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times)


if __name__ == "__main__":
    main()
