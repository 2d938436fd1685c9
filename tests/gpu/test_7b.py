"""7B models with random weights on one GPU: they load, train and stay within what was counted for them.

Each cell writes peak memory, tokens per second and versions to ``benchmarks/results/``. Skipped without a CUDA device
of 40 GB; needs 16 GB of disk for the weights. Run with ``pytest tests/gpu/test_7b.py``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 39e9:
    pytest.skip("needs a CUDA device of 40 GB: two models of 7B are trained", allow_module_level=True)

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from sft_dist.data.loader import TrainingOrder
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import PreparedData
from sft_dist.plan.activations import trace
from sft_dist.plan.memory import memory_phases
from sft_dist.plan.states import state_bytes
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.process_group import process_group
from sft_dist.runtime.world import World, WorldShape
from sft_dist.sharding import registry
from sft_dist.sharding.verify import MovementCheck, verify_sharding
from sft_dist.train.step import train_step
from tests.helpers import cells, figures
from tests.helpers.big_model import write_checkpoint
from tests.helpers.host_memory import peak_anonymous_memory

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

MODELS: dict[str, tuple[PretrainedConfig, int]] = {
    "llama-2-7b": (LlamaConfig(tie_word_embeddings=False), 6_738_415_616),
    "qwen2.5-7b": (
        Qwen2Config(
            vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        ),
        7_615_616_512,
    ),
}  # fmt: skip

SEQ_LEN, STEPS, WARM_UP = 4096, 8, 2


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with process_group(World(0, 0, WorldShape()), CUDA, dist.HashStore()):
        yield


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    config, numel = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    assert write_checkpoint(folder, config, num_files=4) == numel
    return request.param, folder


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_a_7b_model_trains(base: tuple[str, Path], method: str) -> None:
    name, folder = base
    result = measure(folder, method, CUDA)
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}-{method}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    assert min(result["losses"][-3:]) < result["losses"][0]
    planned, peak = result["planned_peak_bytes"], result["peak_device_bytes"]
    figures.lines.append(
        f"{name} {method}: planned {planned / 2**30:.2f} GiB, allocated {peak / 2**30:.2f} at the peak"
    )
    assert result["states_bytes"] < peak
    assert abs(planned / peak - 1) < 0.05
    # Weights pass through host memory, and none stay.
    assert result["host_growth_loading_bytes"] < 3e9


def measure(folder: Path, method: str, device: torch.device, *, seq_len: int = SEQ_LEN) -> dict[str, Any]:
    """Trains a few packed sequences and tells what it took."""
    cfg = cells.config(
        str(folder), {"type": method, "r": 16, "alpha": 32}, "fsdp2", precision={"compute": "bf16"},
        data={"max_seq_len": seq_len}, train={"global_batch_size": 2, "micro_batch_size": 1, "max_steps": STEPS},
        optim={"lr": 2e-4, "max_grad_norm": 1.0},
    )  # fmt: skip
    run = resolve(cfg, WorldShape())
    started = time.perf_counter()
    with peak_anonymous_memory() as host:
        strategy = registry.apply(run, device)
    load_s = time.perf_counter() - started
    verify_sharding(strategy, registry.describe(run, 0))
    data = packed_data(seq_len, run.model.vocab_size)
    order = TrainingOrder(data, run.batch, run.seed)
    losses, durations = [], []
    check = MovementCheck(strategy)
    try:
        for number in range(STEPS):
            started = time.perf_counter()
            out = train_step(strategy, data, run.batch, order.step(number), rank=0, device=device, lr=2e-4)
            losses.append(float(out.loss))
            durations.append(time.perf_counter() - started)
            if number == 0:
                check.verify(0)
    finally:
        strategy.close()
    tokens = sum(order.step(number).num_tokens for number in range(WARM_UP, STEPS))
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "method": method, "seq_len": seq_len, "losses": losses, "load_s": load_s,
        "tokens_per_s": tokens / sum(durations[WARM_UP:]),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "states_bytes": state_bytes(run).total, "planned_peak_bytes": planned_peak_bytes(run, data),
        "host_growth_loading_bytes": host[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "deepspeed")},
    }  # fmt: skip


def planned_peak_bytes(run: Run, data: PreparedData) -> int:
    """What torch's allocator hands out until the steps end, for packs that are all alike; nothing is saved here."""
    lengths = tuple(len(data.row(row)[0]) for row in data.packs[0])
    phases = memory_phases(run, trace(run, seq_lens=lengths, supervised=int(data.num_supervised[0])), None)
    return max(phase.allocated_bytes for phase in phases if phase.name != "save")


def packed_data(seq_len: int, vocab: int) -> PreparedData:
    """Sixteen full packs of a few rows each, of a pattern that can be learned."""
    lengths = [seq_len // 2, seq_len // 4, seq_len // 8, seq_len // 8] * 16
    rng = np.random.default_rng(0)
    ids = [(rng.integers(3, vocab) + np.arange(n)) % 1000 + 3 for n in lengths]
    masks = [np.arange(n) >= n // 4 for n in lengths]
    return PreparedData.of(list(zip(ids, masks, strict=True)), Packs.of(np.arange(64).reshape(16, 4)))
