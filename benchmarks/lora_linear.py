"""LoRA and QLoRA: our forward and backward against PEFT's, on one decoder block without attention, on the CPU.

    python benchmarks/lora_linear.py [--hidden 1024] [--tokens 1024] [--rank 16] [--threads 1 2] [--rounds 5]

The block has the seven linear layers of a Llama: q, k and v share an input, gate and up share another. Both sides have
the same weights and the same input and differ in nothing but the class of the seven layers. For every case one line:

    time      ours / PEFT's, CPU seconds of all threads for forward and backward of the block; the least of
              alternating rounds each, because other processes' use of caches adds to it
    recomp.   the same with the block recomputed in backward, as activation checkpointing does
    kept      what forward keeps for backward, each storage counted once, parameters not counted
    dequant.  dequantisations in forward and backward; and with the block recomputed

A ratio below 1 is in our favour.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sft_dist.model import lora, nf4


class Block(nn.Module):
    """The linear layers of a Llama block with an elementwise stand-in for attention, so that only they are timed."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        wide = hidden * 7 // 2
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate_proj = nn.Linear(hidden, wide, bias=False)
        self.up_proj = nn.Linear(hidden, wide, bias=False)
        self.down_proj = nn.Linear(wide, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = F.rms_norm(x, x.shape[-1:])
        x = x + self.o_proj(self.q_proj(u) + self.k_proj(u) + self.v_proj(u))
        u = F.rms_norm(x, x.shape[-1:])
        return x + self.down_proj(F.silu(self.gate_proj(u)) * self.up_proj(u))


def pair(*, hidden: int, rank: int, dropout: float, quantized: bool, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """(PEFT's, ours): the same block with the same values."""
    torch.manual_seed(0)
    block = Block(hidden).to(dtype).requires_grad_(False)
    if quantized:
        for name, linear in list(block.named_children()):
            setattr(block, name, nf4.NF4Linear.quantize(linear, dtype))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules="all-linear")
    config.target_modules = [name for name, _ in block.named_children()]
    theirs = get_peft_model(block, config, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter, dtype=dtype) * 0.02
    for module in theirs.modules():
        if isinstance(module, lora.PeftLinear):
            module.cast_input_dtype_enabled = False
    ours = copy.deepcopy(theirs)
    lora.fuse_lora(ours)
    assert sum(isinstance(m, lora.LoraLinear) for m in ours.modules()) == 7
    return theirs.train(), ours.train()


def step(model: nn.Module, x: Tensor, *, recompute: bool) -> None:
    y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
    y.sum().backward()
    model.zero_grad(set_to_none=True)
    x.grad = None


def time_ratio(theirs: Callable[[], None], ours: Callable[[], None], rounds: int) -> float:
    """The two alternate, so that what else the machine does meets both; the least was disturbed least."""
    best = [float("inf")] * 2
    for _ in range(rounds + 1):  # the first round warms up
        for side, run in enumerate((theirs, ours)):
            start = time.process_time()
            run()
            best[side] = min(best[side], time.process_time() - start)
    return best[1] / best[0]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the whole block: what the norms and products between the layers keep is the same on both sides."""
    storages: dict[int, int] = {}
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    total = sum(storages.values())
    del y
    return total


class Dequantisations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "bitsandbytes::dequantize_4bit"
        return func(*args, **(kwargs or {}))


def dequantisations(run: Callable[[], None]) -> int:
    with Dequantisations() as seen:
        run()
    return seen.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, hidden {given.hidden}, {given.tokens} tokens, r {given.rank}; ours / PEFT's\n")
    times = "".join(f"{f'time {n}t':>9}{f'recomp. {n}t':>12}" for n in given.threads)
    print(f"{'base':6}{'dtype':9}{'dropout':>8}{times}{'kept':>8}{'KiB/token':>12}  dequant.")
    for quantized, dtype, dropout in itertools.product((False, True), (torch.float32, torch.bfloat16), (0.0, 0.1)):
        models = pair(hidden=given.hidden, rank=given.rank, dropout=dropout, quantized=quantized, dtype=dtype)
        x = torch.randn(1, given.tokens, given.hidden, dtype=dtype, requires_grad=True)
        print(
            f"{'nf4' if quantized else 'dense':6}{str(dtype).removeprefix('torch.'):9}{dropout:8.1f}"
            f"{compare(models, x, threads=given.threads, rounds=given.rounds)}",
            flush=True,
        )


def compare(models: tuple[nn.Module, nn.Module], x: Tensor, *, threads: list[int], rounds: int) -> str:
    """One line of the table, from the times on."""
    runs = [[partial(step, model, x, recompute=recompute) for model in models] for recompute in (False, True)]
    times = ""
    for number in threads:
        torch.set_num_threads(number)
        plain, recomputed = (time_ratio(*both, rounds) for both in runs)
        times += f"{plain:9.2f}{recomputed:12.2f}"
    theirs, ours = (kept_bytes(model, x) for model in models)
    kib = f"{theirs / x.shape[1] / 1024:.0f} -> {ours / x.shape[1] / 1024:.0f}"
    counts = ", ".join(" -> ".join(str(dequantisations(run)) for run in both) for both in runs)
    return f"{times}{ours / theirs:8.2f}{kib:>12}  {counts}"


if __name__ == "__main__":
    main()
