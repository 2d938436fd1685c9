"""The tables of GPUs, networks and prices: complete, sourced, and found by the names that people use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sft_dist.errors import ConfigError, PlanError, UnknownHardware
from sft_dist.hardware.gpus import GIB, Gpu, all_gpus, find_gpu, normal_name, sources
from sft_dist.hardware.networks import find_network, network_names
from sft_dist.hardware.observed import Overhead, efficiencies, overhead_bytes, overhead_source
from sft_dist.hardware.prices import all_prices, latest_rate, prices_of, shipped_prices
from sft_dist.hardware.tables import shipped_table

GPUS = list(all_gpus().values())


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_complete_and_sourced(gpu: Gpu) -> None:
    legend = sources()
    assert gpu.sources
    assert {*gpu.sources, *gpu.figure_sources.values(), *gpu.link.sources, *gpu.host_link.sources} <= legend.keys()
    entry = shipped_table("gpus.yaml")["gpus"][gpu.name]
    assert gpu.figure_sources.keys() <= {*entry, *entry["tflops"]}
    # Sold GB are 1e9 or 2**30 bytes, with a little kept back for error correction.
    assert gpu.sold_gb * 0.99e9 < gpu.memory_bytes <= gpu.sold_gb * GIB
    assert 0.97 * gpu.memory_bytes < gpu.usable_bytes < gpu.memory_bytes
    assert 2e11 < gpu.memory_bandwidth < 1e13
    assert "fp16" in gpu.flops
    assert gpu.flops["fp32"] <= gpu.flops["fp16"]
    assert ("bf16" in gpu.flops) == ("V100" not in gpu.name)
    assert gpu.achievable_flops.keys() == gpu.flops.keys()
    for dtype, rate in gpu.flops.items():
        assert 0.5 < gpu.achievable_flops[dtype] / rate < 0.9
    assert ("MAMF" in gpu.achievable_basis) == gpu.achievable_measured == ("mamf_tflops" in entry)
    assert 70 <= gpu.tdp_w <= 1500
    assert gpu.link.bytes_per_s >= 31e9
    assert gpu.host_link.bytes_per_s >= 15e9


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_is_found_by_its_own_name_and_by_the_drivers(gpu: Gpu) -> None:
    for name in (gpu.name, gpu.name.lower(), gpu.name.replace("-", " "), *gpu.device_names):
        assert find_gpu(name) is gpu


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a100-80gb", "A100-SXM-80GB"),
        ("A100-SXM4-40GB", "A100-SXM-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-PCIe-80GB"),
        ("h100", "H100-SXM"),
        ("H100 SXM5", "H100-SXM"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("h200", "H200-SXM"),
        ("b200", "B200"),
        ("rtx4090", "RTX4090"),
        ("RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000Ada"),
        ("a6000", "RTXA6000"),
        ("l40s", "L40S"),
        ("Tesla V100-SXM2-32GB", "V100-SXM-32GB"),
        ("mi300x", "MI300X"),
    ],
)
def test_names_that_people_use(name: str, expected: str) -> None:
    assert find_gpu(name).name == expected


@pytest.mark.parametrize(
    ("name", "candidates"),
    [
        ("a100", {"A100-SXM-80GB", "A100-SXM-40GB"}),
        ("A100-PCIe", {"A100-PCIe-80GB", "A100-PCIe-40GB"}),
        ("v100", {"V100-SXM-32GB", "V100-SXM-16GB"}),
        ("RTX 6000", {"RTX6000Ada", "RTXA6000"}),
    ],
)
def test_a_name_of_several_gpus_is_refused_with_all_of_them(name: str, candidates: set[str]) -> None:
    with pytest.raises(UnknownHardware) as caught:
        find_gpu(name)
    assert all(candidate in caught.value.what and candidate in caught.value.fix for candidate in candidates)


def test_an_unknown_gpu_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(PlanError) as caught:
        find_gpu("rtx 4099")
    assert caught.value.what == "GPU 'rtx 4099' is not in the table of GPUs"
    assert caught.value.fix.startswith("did you mean RTX4090")
    assert caught.value.exit_code == 2  # a mistake of usage; 3 says that a run does not fit
    with pytest.raises(PlanError, match="fix: Known are: A100-SXM-80GB, "):
        find_gpu("")


def test_published_figures_in_their_units() -> None:
    gpu = find_gpu("a100-80gb")
    assert gpu.memory_bytes == 80 * 2**30
    assert gpu.usable_bytes == int(79.15 * 2**30)
    assert (gpu.memory_bandwidth, gpu.flops["bf16"], gpu.flops["fp32"]) == (2039e9, 312e12, 19.5e12)
    assert gpu.achievable_flops["bf16"] == pytest.approx(271.2e12)
    assert (gpu.link.kind, gpu.link.bytes_per_s, gpu.host_link.bytes_per_s) == ("nvlink", 300e9, 31e9)
    assert find_gpu("h100").achievable_flops["bf16"] == pytest.approx(794.5e12)
    assert find_gpu("l40s").achievable_flops["bf16"] == pytest.approx(0.8 * 362e12)
    # Where no total of a process is published, a common share of the driver's total.
    assert find_gpu("a10g").usable_bytes == int(0.98 * 23028 * 2**20)
    assert not find_gpu("a10g").usable_measured


def test_links_by_the_number_of_gpus() -> None:
    pair = find_gpu("h100-nvl")
    assert (pair.link_among(2).kind, pair.link_bytes_per_s(2)) == ("nvlink", 300e9)
    assert (pair.link_among(4).kind, pair.link_bytes_per_s(4)) == ("pcie", 63e9)
    mesh = find_gpu("mi300x")
    assert [mesh.link_bytes_per_s(gpus) for gpus in (1, 2, 8)] == [64e9, 64e9, 448e9]
    assert find_gpu("h100").link_bytes_per_s(8) == 450e9
    assert not find_gpu("rtx4090").link.peer_to_peer


def test_silent_words_do_not_matter() -> None:
    assert normal_name("NVIDIA GeForce RTX 4090") == normal_name("rtx_4090") == "rtx4090"


def test_networks_by_name_and_by_machine() -> None:
    assert find_network("p5.48xlarge").bytes_per_s == 3200e9 / 8
    assert find_network("standard_nd96amsr_a100_v4") == find_network("InfiniBand HDR x8")
    assert find_network("ethernet-100g").bytes_per_s == 12.5e9
    table = shipped_table("networks.yaml")
    assert set(table["machines"].values()) <= set(network_names())
    for name in network_names():
        assert set(find_network(name).sources) <= table["sources"].keys()
    with pytest.raises(UnknownHardware, match="did you mean infiniband-ndr"):
        find_network("infiniband-nd")


def test_every_price_is_of_a_known_gpu_dated_and_sourced() -> None:
    rows = shipped_table("prices.yaml")["prices"]
    assert len(shipped_prices()) == sum(("on_demand" in row) + ("spot" in row) for row in rows) > 70
    legend = shipped_table("prices.yaml")["sources"]
    for price in shipped_prices():
        assert price.gpu in all_gpus()
        assert price.as_of
        assert price.source in {entry["text"] for entry in legend.values()}
        assert 0 < price.low <= price.per_hour <= price.high
        if price.currency == "USD":
            assert 0.2 < price.per_hour / price.gpus < 20
    assert len({(p.provider, p.machine, p.region, p.gpu, p.kind) for p in shipped_prices()}) == len(shipped_prices())


def test_spot_prices_are_the_middle_of_their_range() -> None:
    (spot,) = [
        price
        for price in prices_of(find_gpu("h100"))
        if (price.machine, price.region, price.kind) == ("p5.48xlarge", "us-east-1", "spot")
    ]
    assert (spot.low, spot.high, spot.per_hour) == (9.37, 19.3, pytest.approx(14.335))


def test_japanese_prices_become_dollars_by_the_hour() -> None:
    tsubame = [price for price in prices_of(find_gpu("tsubame4")) if price.machine == "node_f"]
    assert [price.usd_per_hour(150.0)[0] for price in tsubame] == [pytest.approx(275 / 150)]
    (year,) = [price for price in shipped_prices() if price.provider.startswith("SQUID")]
    assert year.per_hour == pytest.approx(7_032_000 / 8760)
    assert year.terms is not None


def test_the_newest_rate_counts() -> None:
    assert (latest_rate().jpy_per_usd, latest_rate().as_of) == (156.2, "2026-02-04")


OWN = """
exchange_rates: [{date: "2027-01-01", jpy_per_usd: 140}]
prices:
  - {provider: AWS, machine: p5.48xlarge, region: us-east-1, gpu: h100, gpus: 8, on_demand: 40}
  - {provider: Our Lab, machine: node, gpu: NVIDIA A100-SXM4-80GB, gpus: 8, on_demand: 800, currency: JPY, as_of: "2027"}
"""


def test_a_file_of_ones_own_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(OWN)
    prices = all_prices(str(path))
    aws = [p for p in prices if (p.provider, p.machine, p.region) == ("AWS", "p5.48xlarge", "us-east-1")]
    assert [(p.kind, p.per_hour, p.source, p.as_of) for p in aws] == [("on demand", 40.0, str(path), "not dated")]
    (lab,) = [p for p in prices if p.provider == "Our Lab"]
    assert (lab.gpu, lab.currency, lab.as_of) == ("A100-SXM-80GB", "JPY", "2027")
    # The spot price of the replaced machine goes too.
    assert len(prices) == len(shipped_prices()) - 2 + 2
    assert latest_rate(str(path)).jpy_per_usd == 140


@pytest.mark.parametrize(
    ("row", "what", "fix"),
    [
        ("{machine: m, gpu: h100, gpus: 8, on_demand: 1}", "provider is missing", "add provider"),
        ("{provider: p, machine: m, gpu: h100, gpus: 8}", "there is no price", "add on_demand or spot"),
        (
            "{provider: p, machine: m, gpu: h100, gpus: 8, ondemand: 1}",
            "ondemand is not a key",
            "did you mean on_demand?",
        ),
        ("{provider: p, machine: m, gpu: h1000, gpus: 8, on_demand: 1}", "gpu: GPU 'h1000' is not in", "did you mean"),
        ("{provider: p, machine: m, gpu: h100, gpus: 8, on_demand: 0}", "on_demand is 0", "set it to a number > 0"),
        ("{provider: p, machine: m, gpu: h100, gpus: 8, on_demand: 5 USD}", "on_demand is '5 USD'", "a number > 0"),
        ("{provider: p, machine: m, gpu: h100, gpus: 0, on_demand: 1}", "gpus is 0", "a whole number >= 1"),
        ("{provider: p, machine: m, gpu: h100, gpus: 1, on_demand: 1, per: day}", "per is 'day'", "hour or year"),
        (
            "{provider: p, machine: m, gpu: h100, gpus: 1, on_demand: 1, currency: EUR}",
            "currency is 'EUR'",
            "USD or JPY",
        ),
        ("just text", "prices.0 is 'just text'", "write {provider, machine, gpu, gpus, on_demand}"),
    ],
)
def test_mistakes_in_a_file_of_ones_own(row: str, what: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"prices: [{row}]")
    with pytest.raises(ConfigError) as caught:
        all_prices(str(path))
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert str(path) in caught.value.what


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        all_prices(str(tmp_path / "absent.yaml"))
    (tmp_path / "text.yaml").write_text("nothing: [")
    with pytest.raises(ConfigError, match="is not YAML"):
        all_prices(str(tmp_path / "text.yaml"))
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match="holds no keys"):
        all_prices(str(tmp_path / "list.yaml"))


def test_neither_tables_nor_bill_import_torch() -> None:
    code = (
        "import sys, sft_dist.plan.cost, sft_dist.plan.money; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_published_runs_reached() -> None:
    rows = efficiencies()
    assert len(rows) == 16
    for row in rows:
        assert row.gpu in all_gpus()
        assert 0 < row.low <= row.median <= row.high < 1
        assert row.p10 is None or row.low <= row.p10 <= row.median
        assert row.source
        # No run is faster than its GPU's matrix products.
        assert row.high <= find_gpu(row.gpu).achievable_flops["bf16"] / find_gpu(row.gpu).flops["bf16"]
    assert len({(row.gpu, row.method, row.kernels, row.size) for row in rows}) == len(rows)
    assert overhead_bytes("cuda_context_lazy") == int(0.47 * GIB)
    for name in get_args(Overhead):
        assert 0.4 * GIB < overhead_bytes(name) < 2 * GIB
        assert "github.com" in overhead_source(name)
