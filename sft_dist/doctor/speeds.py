"""What the measured speeds say: a straggler by name, a slow link, a network that is not the one that was stated."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft_dist.doctor.finding import Finding, Level
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.hardware.networks import find_network

# Times slower than the median of the nodes. All nodes wait for the slowest in every step: at three times, a run takes
# three times as long and as much money, which nobody wants without being asked.
ODD_CORE, BAD_CORE = 1.5, 3.0
# GPUs of one model differ by some percent.
ODD_GPU, BAD_GPU = 1.2, 2.0
# A link among others, and against the table.
ODD_LINK, BAD_LINK = 3.0, 10.0
# Faster than this no link is called slow: one process cannot tell such links apart over TCP.
FAST_BYTES_PER_S = 0.5e9
# Of what the table leads to expect.
LOW_SHARE, BAD_SHARE = 0.5, 0.1
# What gloo reaches over one TCP connection, at most, whatever the network. Measured between processes of one machine:
# 1 to 3 GB/s.
TCP_BYTES_PER_S = 1e9
# Half of what a link of 1 Gbit/s carries: nothing is trained over less.
LEAST_BYTES_PER_S = 60e6
# As in plans (plan/rates.py): what collectives reach of a network's and of a link's rate.
NETWORK_SHARE, NVLINK_SHARE, PCIE_SHARE = 0.8, 0.77, 0.75
# Of a core, that a process which is alone on it gets.
WHOLE_CORE = 0.85


@dataclass(frozen=True)
class Pair:
    """What was measured between two nodes, there and back."""

    one: str
    other: str
    latency_s: float
    bytes_per_s: float


def _level(times: float, odd: float, bad: float) -> Level:
    return "failed" if times >= bad else "warning" if times >= odd else "ok"


def check_cores(windows: Mapping[str, Sequence[Mapping[str, float]]]) -> list[Finding]:
    """The same products on a core of every node, at the same time.

    Args:
        windows: by node, ``flops_per_s`` and ``share`` of the core in each of some windows. The best of them counts, so
            that a node is slow only where it is slow all the time.
    """
    best = {node: max(found, key=lambda window: window["flops_per_s"]) for node, found in windows.items() if found}
    if not best:
        return []
    rates = {node: window["flops_per_s"] for node, window in best.items()}
    # Of two nodes the faster one is what a node can do.
    usual = max(rates.values()) if len(rates) == 2 else statistics.median_high(rates.values())
    # Where not even that node has a core to itself, all are busy with other things, and small differences are chance.
    is_quiet = next(best[node]["share"] for node, rate in rates.items() if rate == usual) >= WHOLE_CORE
    found = []
    for node, rate in rates.items():
        level = _level(usual / rate, ODD_CORE if is_quiet else BAD_CORE, BAD_CORE)
        if level != "ok":
            share = best[node]["share"]
            slow = f"{usual / rate:.1f} times slower than the others ({rate / 1e9:.1f} GFLOP/s on a core)"
            if share < WHOLE_CORE:
                what = f"{slow}: it gets {share:.0%} of a core"
                fix = "end what else runs there, or lift its CPU limit (top, systemd-cgtop); or leave the node out"
            else:
                what = f"{slow}, though it has the core to itself"
                fix = "look at its clock, heat and power saving (turbostat, dmesg); or leave the node out"
            found.append(Finding("straggler", node, level, what, fix, round(usual / rate, 2)))
    return found or [Finding("straggler", "", "ok", f"none: a core does {_range(rates.values(), 1e9, 'GFLOP/s')}")]


def check_gpu_products(products: Mapping[tuple[str, int], float], names: Mapping[str, str]) -> list[Finding]:
    """The same product on every GPU.

    Args:
        products: FLOP/s in bf16 by node and device.
        names: of the GPUs, by node.
    """
    if not products:
        return []
    usual = statistics.median_high(products.values())
    found = []
    for (node, device), rate in products.items():
        level = _level(usual / rate, ODD_GPU, BAD_GPU)
        if level != "ok":
            what = f"GPU {device} is {usual / rate:.1f} times slower than the others ({rate / 1e12:.0f} TFLOP/s)"
            fix = "look at its clock, heat and power (nvidia-smi -q -d PERFORMANCE); or leave the node out"
            found.append(Finding("slow GPU", node, level, what, fix, round(usual / rate, 2)))
    table = _known_gpu(next(iter(names.values()), ""))
    if table is not None and "bf16" in table.flops and usual < LOW_SHARE * table.achievable_flops["bf16"]:
        what = f"{usual / 1e12:.0f} TFLOP/s; {table.name} reaches {table.achievable_flops['bf16'] / 1e12:.0f}"
        fix = "look at clocks and power limits: nvidia-smi -q -d CLOCK,POWER"
        found.append(Finding("GPU speed", "", "warning", what, fix, usual / 1e12))
    return found or [Finding("GPU speed", "", "ok", _range(products.values(), 1e12, "TFLOP/s in bf16"))]


def _known_gpu(name: str) -> Gpu | None:
    try:
        return find_gpu(name)
    except UnknownHardware:
        return None


def check_pairs(pairs: Sequence[Pair], *, network: str | None) -> list[Finding]:
    """Links between nodes against each other, and against the table of networks.

    Args:
        network: as the configuration calls it.
    """
    if not pairs:
        return []
    # One node in three with a slow cable has two links of three: what a good link does is seen in the better ones.
    usual = sorted(pair.bytes_per_s for pair in pairs)[len(pairs) * 3 // 4]
    expected = TCP_BYTES_PER_S
    if network is not None:
        expected = min(expected, find_network(network).bytes_per_s * NETWORK_SHARE)
    slow = [p for p in pairs if usual / p.bytes_per_s >= ODD_LINK and p.bytes_per_s < FAST_BYTES_PER_S]
    found = [*_slow_nodes(pairs, slow, usual)]
    named = {finding.node for finding in found}
    for pair in slow:
        if pair.one not in named and pair.other not in named:
            times = usual / pair.bytes_per_s
            what = f"{pair.one} - {pair.other}: {_mb(pair.bytes_per_s)}, {times:.0f} times slower than other links"
            fix = "look at cables, switch ports and routes between the two; or leave one of them out"
            found.append(Finding("slow link", "", _level(times, ODD_LINK, BAD_LINK), what, fix, pair.bytes_per_s / 1e6))
    least = min(LEAST_BYTES_PER_S, expected / 2) if network is None else expected * LOW_SHARE / 2
    if usual < least:
        whose = (
            "training needs more" if network is None else f"hardware.network {network} leads to expect {_mb(expected)}"
        )
        fix = "see which interface is used (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME): a slow one may have been taken"
        what = f"{_mb(usual)} between nodes over TCP; {whose}"
        found.append(Finding("network", "", "warning", what, fix, usual / 1e6))
    rates, latency = _range((p.bytes_per_s for p in pairs), 1e6, "MB/s"), max(p.latency_s for p in pairs)
    return found or [Finding("network", "", "ok", f"{rates} over TCP, {latency * 1e6:.0f} us", value=usual / 1e6)]


def _slow_nodes(pairs: Sequence[Pair], slow: Sequence[Pair], usual: float) -> list[Finding]:
    """Nodes whose links are slow, most of them, where others' are not."""
    if len(pairs) < 3:
        return []
    found = []
    for node in dict.fromkeys(name for pair in slow for name in (pair.one, pair.other)):
        own = [pair for pair in pairs if node in (pair.one, pair.other)]
        bad = [pair for pair in own if pair in slow]
        # The other ends have good links beside this one.
        others_fine = all(
            any(p not in slow for p in pairs if end in (p.one, p.other))
            for pair in bad
            for end in (pair.one, pair.other)
            if end != node
        )
        if len(own) > 1 and len(bad) == len(own) and others_fine:
            rate = statistics.median(pair.bytes_per_s for pair in bad)
            what = f"all its links are slow: {_mb(rate)}, {usual / rate:.0f} times slower than those of other nodes"
            fix = "look at its network card, cable and switch port (ethtool); or leave the node out"
            found.append(Finding("slow link", node, _level(usual / rate, ODD_LINK, BAD_LINK), what, fix, rate / 1e6))
    return found


def check_all_reduce(
    measured: Mapping[str, Mapping[str, Any]], *, gpu: str, gpus_per_node: int, nodes: int, network: str | None
) -> list[Finding]:
    """The all-reduce of all processes against the table of GPUs and networks; on CPUs it is only said.

    Args:
        measured: by node, ``bytes_per_s`` (bus bandwidth) and ``backend``.
        gpu: name, as its driver says it.
    """
    if not measured:
        return []
    rate = min(found["bytes_per_s"] for found in measured.values())
    backend = next(iter(measured.values()))["backend"]
    table = _known_gpu(gpu)
    said = f"{rate / 1e9:.3g} GB/s ({backend})"
    if backend == "nccl" and table is not None:
        limits = []
        if gpus_per_node > 1:
            share = PCIE_SHARE if table.link_among(gpus_per_node).kind == "pcie" else NVLINK_SHARE
            limits.append(table.link_bytes_per_s(gpus_per_node) * share)
        if nodes > 1 and network is not None:
            limits.append(find_network(network).bytes_per_s * NETWORK_SHARE)
        if limits and rate < LOW_SHARE * min(limits):
            what = f"{said}; the tables lead to expect {min(limits) / 1e9:.0f} GB/s"
            fix = "NCCL_DEBUG=INFO says which way it takes: is InfiniBand not used, or NVLink down?"
            level: Level = "failed" if rate < BAD_SHARE * min(limits) else "warning"
            return [Finding("all-reduce", "", level, what, fix, rate / 1e9)]
    return [Finding("all-reduce", "", "ok", said, value=rate / 1e9)]


def _range(values: Iterable[float], unit: float, name: str) -> str:
    found = [value / unit for value in values]
    low, high = f"{min(found):.3g}", f"{max(found):.3g}"
    return f"{high} {name}" if low == high else f"{low} to {high} {name}"


def _mb(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:,.1f} MB/s"
