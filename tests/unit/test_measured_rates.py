"""``sft-dist calibrate``: what is measured, kept, and taken by plans. On the CPU: the code is that of a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_dist.errors import ConfigError
from sft_dist.hardware.gpus import find_gpu
from sft_dist.plan import benchmark
from sft_dist.plan.calibrate import calibrate
from sft_dist.plan.measured_rates import MeasuredRates, as_measured, lookup_rates, store_rates
from sft_dist.plan.rates import gpu_rates
from tests.helpers import cells

H100 = find_gpu("h100")

RATES = MeasuredRates(
    gpu="H100-SXM", product_flops_per_s={"bf16": 600e12}, memory_bytes_per_s=2.5e12, link_bytes_per_s={8: 300e9},
    date="2026-01-01", versions={"torch": "2"},
)  # fmt: skip


def test_plans_take_what_was_measured() -> None:
    """As it was measured: the shares that tables are taken at are not taken of it again."""
    rates = gpu_rates(as_measured(H100, RATES, gpus_per_node=8), dtype="bf16", gpus_per_node=8)
    before = gpu_rates(H100, dtype="bf16", gpus_per_node=8)
    assert rates.product_flops_per_s == pytest.approx(600e12)
    assert rates.memory_bytes_per_s == pytest.approx(2.5e12)
    assert rates.links.node_bytes_per_s == pytest.approx(300e9)
    assert before.product_flops_per_s != pytest.approx(600e12)
    # What was not measured is off by as much as what was; links among another number stay as they are in the table.
    shares = 600e12 / H100.achievable_flops["bf16"]
    tf32 = as_measured(H100, RATES, gpus_per_node=4).achievable_flops["tf32"]
    assert tf32 == pytest.approx(H100.achievable_flops["tf32"] * shares)
    four = gpu_rates(as_measured(H100, RATES, gpus_per_node=4), dtype="bf16", gpus_per_node=4)
    assert four.links == gpu_rates(H100, dtype="bf16", gpus_per_node=4).links
    assert "calibrated here on 2026-01-01" in as_measured(H100, RATES, gpus_per_node=8).achievable_basis


def test_a_link_over_pcie_too() -> None:
    gpu = find_gpu("rtx 4090")
    rates = replace(RATES, gpu=gpu.name, link_bytes_per_s={2: 9e9})
    measured = gpu_rates(as_measured(gpu, rates, gpus_per_node=2), dtype="bf16", gpus_per_node=2)
    assert measured.links.node_bytes_per_s == pytest.approx(9e9)


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    assert lookup_rates("H100-SXM", folder=tmp_path) is None
    store_rates(RATES, folder=tmp_path / "new")
    assert lookup_rates("H100-SXM", folder=tmp_path / "new") == RATES
    # A launch of two measures the link among two: that among eight is still known.
    store_rates(replace(RATES, link_bytes_per_s={2: 200e9}, date="2026-02-02"), folder=tmp_path / "new")
    again = lookup_rates("H100-SXM", folder=tmp_path / "new")
    assert again == replace(RATES, link_bytes_per_s={8: 300e9, 2: 200e9}, date="2026-02-02")


@pytest.mark.parametrize(
    "damage", ["", "[1]", "{}", '{"format": 1}', '{"format": 99', "other format", "no rate", "nothing in a second"]
)
def test_a_damaged_file_counts_as_absent(tmp_path: Path, damage: str) -> None:
    path = store_rates(RATES, folder=tmp_path)
    content = json.loads(path.read_text())
    if damage == "other format":
        damage = json.dumps(content | {"format": 0})
    elif damage == "no rate":
        damage = json.dumps({key: value for key, value in content.items() if key != "memory_bytes_per_s"})
    elif damage == "nothing in a second":
        damage = json.dumps(content | {"memory_bytes_per_s": 0})
    path.write_text(damage)
    assert lookup_rates("H100-SXM", folder=tmp_path) is None


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="this machine has none"):
        calibrate(None)


def test_a_rate_is_work_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says what each call takes: 2 m n k FLOPs, and bytes that are read and written."""
    taken = iter([4.0, 1.0, 2.0] * 2)
    monkeypatch.setattr(benchmark, "_timed", lambda device, work: next(taken))
    assert benchmark.best_product(cells.CPU, "fp32", shapes=[(8, 4, 2)], repeats=3) == 2 * 8 * 4 * 2 / 2.0
    assert benchmark.copy_rate(cells.CPU, size_bytes=1000, repeats=3) == 2 * 1000 / 2.0
