"""Planned against measured on this GPU: peak memory within 5 %, tokens per second told, both kept.

Each cell probes a 7B model with random weights and writes what was planned and what came out to
``benchmarks/results/``. Skipped without a CUDA device of 40 GB; needs 16 GB of disk. Run with
``pytest -s tests/gpu/test_plan.py``; with ``SFT_DIST_CACHE`` set, plans on this machine take what it keeps.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 39e9:
    pytest.skip("needs a CUDA device of 40 GB: models of 7B are trained", allow_module_level=True)

from rich.console import Console
from transformers import LlamaConfig

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.plan.calibrate import compared, measure
from sft_dist.plan.calibration import calibration_key, lookup
from sft_dist.plan.data import counted_plan
from sft_dist.plan.expected import Expected, expect
from sft_dist.plan.machines import Machines, machines_here
from sft_dist.plan.measured_rates import lookup_rates, store_rates
from sft_dist.plan.workload import full_step_tokens
from sft_dist.resolve import resolve
from sft_dist.runtime.process_group import process_group
from sft_dist.runtime.world import World, WorldShape
from sft_dist.train.probe import Probe, planned_peak_bytes, tell, train_some
from sft_dist.train.ready import Process
from sft_dist.train.receipt import versions
from tests.gpu.test_7b import CUDA, RESULTS, SEQ_LEN, packed_data
from tests.helpers import cells
from tests.helpers.big_model import write_checkpoint

pytestmark = pytest.mark.gpu

STEPS = 8
PEAK_ERROR = 0.05

# Of Llama-2-7B: a block, and embedding with output layer.
BLOCK_PARAMETERS, OTHER_PARAMETERS = 202_383_360, 262_148_096
# Full-parameter training in bf16 with fp32 masters: weights, gradients and two moments.
FULL_BYTES = 16

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 16, "alpha": 32},
    "qlora": {"type": "qlora", "r": 16, "alpha": 32},
    "full": {"type": "full"},
}


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    with process_group(World(0, 0, WorldShape()), CUDA, dist.HashStore()):
        yield


@pytest.fixture(scope="module")
def machines() -> Machines:
    return machines_here(HardwareConfig(), WorldShape(), torch.cuda.get_device_name(CUDA))


@pytest.fixture(scope="module")
def whole_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama-7b")
    write_checkpoint(folder, LlamaConfig(tie_word_embeddings=False), num_files=4)
    return folder


@pytest.fixture(scope="module")
def first_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many of its blocks as can be trained in full in 60 % of the memory."""
    parameters = 0.6 * torch.cuda.get_device_properties(CUDA).total_memory / FULL_BYTES
    blocks = min(32, int((parameters - OTHER_PARAMETERS) // BLOCK_PARAMETERS))
    folder = tmp_path_factory.mktemp(f"llama-7b-of-{blocks}-blocks")
    write_checkpoint(folder, LlamaConfig(tie_word_embeddings=False, num_hidden_layers=blocks), num_files=4)
    return folder


@pytest.mark.parametrize("recomputed", ["none", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_a_plan_is_what_comes_out(
    request: pytest.FixtureRequest, machines: Machines, method: str, recomputed: str
) -> None:
    folder = request.getfixturevalue("first_blocks" if method == "full" else "whole_7b")
    # Without recomputation the activations of 4,096 tokens of all blocks must fit beside the weights.
    seq_len = SEQ_LEN if recomputed == "full" else SEQ_LEN // 4
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(CUDA)
    assert before < 2**28, "what an earlier cell left is measured too"
    expected, found = planned_and_measured(folder, machines, method, recomputed, seq_len)
    assert found.peak_allocated_bytes is not None
    ratio = (found.peak_allocated_bytes - before) / expected.peak_allocated_bytes
    assert abs(ratio - 1) <= PEAK_ERROR, f"{ratio:.3f} of the planned peak"


def planned_and_measured(
    folder: Path, machines: Machines, method: str, recomputed: str, seq_len: int
) -> tuple[Expected, Probe]:
    """Probes a cell, prints it, keeps it, and writes its file."""
    cfg = cells.config(
        str(folder), METHODS[method], "fsdp2", precision={"compute": "bf16"},
        activation_checkpointing={"mode": recomputed}, data={"max_seq_len": seq_len},
        train={"global_batch_size": 2, "micro_batch_size": 1, "max_steps": STEPS},
        optim={"lr": 2e-4, "max_grad_norm": 1.0},
    )  # fmt: skip
    run = resolve(cfg, WorldShape())
    data = packed_data(seq_len, run.model.vocab_size)
    process = Process(World(0, 0, WorldShape()), CUDA, dist.HashStore())
    started = time.perf_counter()
    found = train_some(run, data, process, steps=STEPS, source="packs of a pattern")
    took_s = time.perf_counter() - started
    counted = counted_plan(run, data, None, source="test")
    whole, _ = expect(cfg, run, machines, counted)
    expected = replace(whole, peak_allocated_bytes=planned_peak_bytes(run))
    tell(run, expected, found, machines, Console(highlight=False))
    kept = lookup(machines.gpu.name, calibration_key(run))
    assert kept is not None
    assert kept.steps == STEPS
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {
        "device": torch.cuda.get_device_name(CUDA), "method": method, "recomputed": recomputed, "seq_len": seq_len,
        "blocks": run.model.num_layers, "tokens_per_step": full_step_tokens(run, counted), "wall_s": took_s,
        "planned": asdict(expected), "measured": asdict(found), "versions": versions(),
    }  # fmt: skip
    name = f"plan-llama-2-7b-{method}-{recomputed}.json"
    (RESULTS / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return expected, found


def test_this_gpu_is_about_what_the_table_says(machines: Machines) -> None:
    """Shared or throttled GPUs are slower, none is faster than its peak."""
    rates = measure(machines.gpu, CUDA, num_gpus=1)
    Console(highlight=False).print(compared(machines.gpu, rates, num_gpus=1))
    store_rates(rates)
    assert lookup_rates(machines.gpu.name) == rates
    for dtype, rate in rates.product_flops_per_s.items():
        assert 0.3 * machines.gpu.achievable_flops[dtype] < rate < 1.05 * machines.gpu.flops[dtype], dtype
    assert 0.5 * machines.gpu.memory_bandwidth < rates.memory_bytes_per_s < 1.05 * machines.gpu.memory_bandwidth
