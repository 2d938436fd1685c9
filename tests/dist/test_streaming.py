"""A base model on its way into the shards: who reads what, what it costs in host memory, and that nothing is changed."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.model.nf4 import NF4Linear
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from tests.helpers import cells, figures
from tests.helpers.big_model import LLAMA_2B, LLAMA_200M, write_checkpoint
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]

SAMPLE_EVERY_S = 0.002
GB = 10**9

# Of the micro-batch whose loss is compared.
ROWS = (0, 1, 2)


@dataclass(frozen=True)
class Loaded:
    """One rank's view of a load.

    Args:
        peak_bytes: growth of this process's anonymous memory while the model was loaded, at its highest.
        shard_bytes, state_bytes: of parameters and of buffers, as described.
        read_bytes: of weight files.
        loss: mean over the supervised tokens of one micro-batch, the same on every rank.
    """

    peak_bytes: int
    shard_bytes: int
    state_bytes: int
    read_bytes: int
    loss: float


def load(cfg_yaml: str) -> Loaded:
    run = resolve(Config.model_validate(yaml.safe_load(cfg_yaml)), WorldShape(1, dist.get_world_size()))
    read: list[int] = []
    with peak_anonymous_memory() as peak:
        strategy = registry.apply(run, cells.CPU, on_bytes=read.append)
    spec = registry.describe(run, dist.get_rank())
    batch = collate(cells.synthetic_data(), list(ROWS))
    try:
        loss = float(strategy.evaluate(batch)) / batch.num_supervised
    finally:
        strategy.close()
    return Loaded(peak[0], spec.parameter_bytes, run.model.buffer_bytes, sum(read), loss)


@contextmanager
def peak_anonymous_memory() -> Iterator[list[int]]:
    """A list that at the end holds the growth of memory that is neither a file's nor shared, sampled, at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests have freed would hide what this one takes
    before, peak, ended = anonymous_bytes(), [0], threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            peak[0] = max(peak[0], anonymous_bytes() - before)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()
        peak[0] = max(peak[0], anonymous_bytes() - before)


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/self/status has no RssAnon")


@pytest.fixture(scope="module")
def base_200m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-200m")
    assert 2e8 < write_checkpoint(folder, LLAMA_200M, num_files=4) < 2.2e8
    return folder


@pytest.fixture(scope="module")
def base_2b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-2b")
    assert 2e9 < write_checkpoint(folder, LLAMA_2B, num_files=4) < 2.2e9
    return folder


def plain_loss(base: Path, method: str, dtype: torch.dtype) -> float:
    """The loss of the same micro-batch by transformers alone, row by row."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype,
    )  # fmt: skip
    options: dict[str, Any] = {"quantization_config": quantization} if method == "qlora" else {}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # it would repack the weight in bf16
    data, total, count = cells.synthetic_data(), 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids, supervised = (torch.as_tensor(array) for array in data.row(row))
            logits = model(ids.long()[None]).logits[0, :-1].double()
            wanted = supervised[1:].bool()
            total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[1:][wanted].long(), reduction="sum"))
            count += int(wanted.sum())
    return total / count


def largest_tensor_bytes(config: LlamaConfig) -> int:
    return 2 * config.vocab_size * config.hidden_size


def assert_streamed(world: World, base: Path, config: LlamaConfig, *, ranks: int, strategy: str, method: str,
                    spare_bytes: float) -> list[Loaded]:  # fmt: skip
    cfg = cells.config(str(base), method, strategy, precision={"compute": "bf16"})
    loaded: list[Loaded] = world(ranks).run(load, cells.dump(cfg))
    allowed = max(one.shard_bytes + one.state_bytes for one in loaded) + largest_tensor_bytes(config) + spare_bytes
    worst = max(one.peak_bytes for one in loaded)
    figures.lines.append(
        f"load {base.name.rstrip('0123456789')} {method} {strategy} on {ranks}: shard "
        f"{loaded[0].shard_bytes / GB:.2f} GB + quantisation state {loaded[0].state_bytes / GB:.2f}; "
        f"host memory grew by {worst / GB:.2f} GB at the peak, {allowed / GB:.2f} allowed"
    )
    assert worst <= allowed
    whole = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    # Ranks read whole rows and whole blocks: a row at each end of a part may be read twice.
    assert 0.99 * whole < sum(one.read_bytes for one in loaded) < 1.02 * whole
    assert max(one.read_bytes for one in loaded) < 1.05 * whole / ranks
    return loaded


@pytest.mark.parametrize(("ranks", "strategy", "method"), [
    (2, "fsdp2", "lora"), (2, "fsdp2", "qlora"), (2, "zero3", "lora"), (2, "zero3", "qlora"),
])  # fmt: skip
def test_a_rank_takes_its_shard(world: World, base_200m: Path, ranks: int, strategy: str, method: str) -> None:
    loaded = assert_streamed(world, base_200m, LLAMA_200M, ranks=ranks, strategy=strategy, method=method, spare_bytes=1e8)
    for one in loaded:
        print(one, plain_loss(base_200m, method, torch.bfloat16))
