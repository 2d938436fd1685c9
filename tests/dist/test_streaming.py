"""A base model on its way into the shards: who reads what, what it costs in host memory, and that nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from sft_dist.config.schema import Config
from sft_dist.data.loader import collate
from sft_dist.model.nf4 import NF4Linear
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding import registry
from tests.helpers import cells, figures
from tests.helpers.big_model import LLAMA_2B, LLAMA_200M, write_checkpoint
from tests.helpers.host_memory import peak_anonymous_memory
from tests.helpers.pool import WorldPool
from tests.helpers.quantized_model import load_plain

World = Callable[[int], WorldPool]

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
    NF4Linear.quantize(torch.nn.Linear(64, 64), torch.float32)  # libraries that are loaded at first use
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


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype,
    )  # fmt: skip


def plain_loss(base: Path, method: str, dtype: torch.dtype) -> float:
    """The loss of the same micro-batch by transformers alone, row by row."""
    return loss_of(load_plain(base, dtype, nf4(dtype) if method == "qlora" else None))


def loss_of(model: Any) -> float:
    """A plain model's loss of the micro-batch of ``ROWS``, row by row."""
    data, total, count = cells.synthetic_data(), 0.0, 0
    with torch.no_grad():
        for row in ROWS:
            ids, supervised = (torch.as_tensor(array) for array in data.row(row))
            logits = model(ids.long()[None]).logits[0, :-1].double()
            wanted = supervised[1:].bool()
            total += float(torch.nn.functional.cross_entropy(logits[wanted], ids[1:][wanted].long(), reduction="sum"))
            count += int(wanted.sum())
    return total / count


@pytest.mark.ci
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_loss_is_that_of_a_plain_load(world: World, base_200m: Path, method: str) -> None:
    plain = plain_loss(base_200m, method, torch.float32)
    for strategy in ("fsdp2", "zero3"):
        cfg = cells.config(str(base_200m), method, strategy)
        for one in world(2).run(load, cells.dump(cfg)):
            assert one.loss == pytest.approx(plain, rel=1e-5)


def whole_weights(cfg_yaml: str) -> dict[str, np.ndarray[Any, Any]]:
    """Every parameter gathered from what the ranks hold, and the buffers of rank 0, bit for bit."""
    run = resolve(Config.model_validate(yaml.safe_load(cfg_yaml)), WorldShape(1, dist.get_world_size()))
    strategy = registry.apply(run, cells.CPU)
    try:
        tensors = {name: tensor.clone() for name, tensor in strategy.full_parameters(trainable_only=False)}
        tensors |= dict(strategy.model.named_buffers())
        return {n: t.contiguous().view(-1).view(torch.uint8).numpy().copy() for n, t in tensors.items()}
    finally:
        strategy.close()


@pytest.mark.parametrize("compute", ["bf16", "fp32"])
@pytest.mark.parametrize(("ranks", "strategy"), [(2, "fsdp2"), (3, "fsdp2"), (2, "zero3"), (3, "zero3"), (2, "zero2")])
def test_nf4_bytes_are_those_of_bitsandbytes(
    world: World, tiny_base: Path, ranks: int, strategy: str, compute: str
) -> None:
    """Three ranks cut through blocks and through scales that are quantised together."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[compute]
    cfg = cells.config(str(tiny_base), "qlora", strategy, precision={"compute": compute})
    ours = world(ranks).run(whole_weights, cells.dump(cfg))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype, quantization_config=nf4(dtype))
    count = 0
    for name, module in plain.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit):
            continue
        count += 1
        state, prefix = module.weight.quant_state, f"hf.base_model.model.{name}.base_layer"
        theirs = {"weight": module.weight.data, "absmax": state.absmax, "nested_absmax": state.state2.absmax,
                  "offset": state.offset.reshape(1)}  # fmt: skip
        for rank in ours:
            for part, tensor in theirs.items():
                np.testing.assert_array_equal(rank[f"{prefix}.{part}"], tensor.view(-1).view(torch.uint8).numpy())
    assert count == 14


@pytest.mark.parametrize(("ranks", "strategy"), [(3, "fsdp2"), (3, "zero3"), (2, "ddp")])
@pytest.mark.parametrize("base", ["tiny_base", "tied_base"])
def test_weights_are_those_of_the_files(
    world: World, base: str, ranks: int, strategy: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(base)
    ours = world(ranks).run(whole_weights, cells.dump(cells.config(str(path), "full", strategy)))
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = dict(plain.named_parameters()) | dict(plain.named_buffers())
    for rank in ours:
        assert {name.removeprefix("hf.") for name in rank} == set(theirs)
        for name, tensor in theirs.items():
            np.testing.assert_array_equal(rank[f"hf.{name}"], tensor.detach().view(-1).view(torch.uint8).numpy())


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


CELLS = pytest.mark.parametrize(("strategy", "method"), [(s, m) for s in ("fsdp2", "zero3") for m in ("lora", "qlora")])


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        ("fsdp2", "qlora"), ("zero3", "lora"), pytest.param("fsdp2", "lora", marks=pytest.mark.ci),
        pytest.param("zero3", "qlora", marks=pytest.mark.ci),
    ],
)  # fmt: skip
def test_a_rank_takes_its_shard(world: World, base_200m: Path, strategy: str, method: str) -> None:
    # A second copy of the model in bf16 takes twice as much.
    assert_streamed(world, base_200m, LLAMA_200M, ranks=2, strategy=strategy, method=method, spare_bytes=2e8)


@pytest.fixture(scope="module")
def plain_loss_2b(base_2b: Path) -> float:
    return plain_loss(base_2b, "lora", torch.bfloat16)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 4])
@CELLS
def test_a_rank_takes_its_shard_of_2b(
    world: World, base_2b: Path, plain_loss_2b: float, ranks: int, strategy: str, method: str
) -> None:
    loaded = assert_streamed(world, base_2b, LLAMA_2B, ranks=ranks, strategy=strategy, method=method, spare_bytes=3e8)
    for one in loaded:
        if method == "lora":
            assert one.loss == pytest.approx(plain_loss_2b, rel=1e-5)
