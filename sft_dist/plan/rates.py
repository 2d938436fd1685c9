"""What a GPU, its links and its host do in a second: figures of ``hardware/`` and what is taken of them in practice.

A measured or published ``efficiency`` scales all of the GPU's work at once, so that the shares below decide only how a
step divides into products, attention and memory traffic. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.hardware.gpus import ComputeDtype, Gpu, Link
from sft_dist.hardware.networks import Network
from sft_dist.plan.launches import MEASURED, Host, host_of
from sft_dist.plan.tape import Work
from sft_dist.sharding.collectives import Collective, Group
from sft_dist.sharding.ring import ring_factor

# Of what the best matrix product reaches: FlashAttention-2 does 175 of 312 TFLOP/s forward and backward on an A100
# (Dao 2023, arXiv 2307.08691, figures 4 to 6: 130 to 220 for heads of 64 and 128), where the best product does 271.
ATTENTION_SHARE = 0.65
# Of the memory's rate: BabelStream reaches 0.85 to 0.93 of it on A100 and H100.
MEMORY_SHARE = 0.85
# Of it, bitsandbytes' dequantisation, whose table look-ups it does not hide.
DEQUANTIZE_SHARE = 0.5
# Of a link's rate in one direction: NCCL's bus bandwidth on eight A100 or H100 is about 230 of 300 and 360 of 450 GB/s
# (github.com/stas00/ml-engineering, network/benchmarks).
NVLINK_SHARE, PCIE_SHARE, NETWORK_SHARE = 0.77, 0.75, 0.8
# Without peer access every byte passes through host memory, in and out.
NO_PEER_SHARE = 0.5
# A transfer from pinned host memory, of PCIe's rate.
HOST_LINK_SHARE = 0.8
# What a collective takes however little it carries, in a node and between nodes: NCCL's all-reduce of a few bytes takes
# 10 us on two and 34 us on eight GPUs of a DGX A100 (github.com/NVIDIA/nccl-tests/issues/123).
NODE_LATENCY_S, NETWORK_LATENCY_S = 20e-6, 50e-6
# Of the host: its memory, all sockets together, for an optimizer that steps there; files read and written. Assumed.
HOST_MEMORY_BYTES_PER_S = 150e9
DISK_BYTES_PER_S = 1e9


@dataclass(frozen=True)
class Links:
    """Between the GPUs of a run.

    Args:
        gpus_per_node: that take part in it.
        node_bytes_per_s: of one GPU to the others of its node, in one direction, as NCCL reaches it.
        network_bytes_per_s: of a node, likewise; None in a run on one node.
    """

    gpus_per_node: int
    node_bytes_per_s: float
    network_bytes_per_s: float | None = None
    node_latency_s: float = NODE_LATENCY_S
    network_latency_s: float = NETWORK_LATENCY_S

    def seconds(self, collective: Collective) -> float:
        """Of one collective, when nothing else is on the links.

        A ring inside each node and one between them work at the same time: the slower one decides. A node's network is
        shared by the groups of the same kind that its GPUs belong to.
        """
        group = collective.group
        if group.size == 1:
            return 0.0
        inside = collective.size_bytes * ring_factor(collective.kind, group.size) / self.node_bytes_per_s
        if not group.crosses_nodes:
            return inside + self.node_latency_s
        assert self.network_bytes_per_s is not None, "a run on several nodes has a network"
        nodes, groups = group.size // group.per_node, self.gpus_per_node // group.per_node
        leaving = _leaving_bytes(collective, group, nodes)
        between = leaving * groups / self.network_bytes_per_s + self.network_latency_s
        return max(inside if group.per_node > 1 else 0.0, between)


def _leaving_bytes(collective: Collective, group: Group, nodes: int) -> float:
    """What leaves a node for one group: of an all-to-all every rank of it sends."""
    factor = ring_factor(collective.kind, nodes)
    return collective.size_bytes * factor * (group.per_node if collective.kind == "all_to_all" else 1)


@dataclass(frozen=True)
class Rates:
    """Of one GPU, and of its share of the host.

    Args:
        product_flops_per_s, attention_flops_per_s: in the compute dtype.
        memory_bytes_per_s, dequantize_bytes_per_s: read and written.
        efficiency: share of all these that the run reaches.
        host: that starts the GPU's kernels.
        host_link_bytes_per_s: between the GPU and host memory, in one direction.
        host_memory_bytes_per_s: for this GPU's part of an optimizer that steps on the host.
    """

    product_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    dequantize_bytes_per_s: float
    links: Links
    host_link_bytes_per_s: float
    host_memory_bytes_per_s: float
    efficiency: float = 1.0
    host: Host = MEASURED

    def work_parts(self, work: Work) -> dict[str, float]:
        """Seconds of the GPU by what takes them."""
        return {
            "matrix products": work.product_flops / self.product_flops_per_s / self.efficiency,
            "attention": work.attention_flops / self.attention_flops_per_s / self.efficiency,
            "element-wise": work.moved_bytes / self.memory_bytes_per_s / self.efficiency,
            "dequantising": work.dequantize_bytes / self.dequantize_bytes_per_s / self.efficiency,
        }

    def copy_seconds(self, size_bytes: int) -> float:
        """Of the GPU for reading and writing so many bytes together."""
        return size_bytes / self.memory_bytes_per_s / self.efficiency


def link_share(link: Link) -> float:
    """Of a link's rate, what collectives reach."""
    return NVLINK_SHARE if link.kind != "pcie" else PCIE_SHARE * (1.0 if link.peer_to_peer else NO_PEER_SHARE)


def gpu_rates(
    gpu: Gpu, *, dtype: ComputeDtype, gpus_per_node: int, network: Network | None = None, efficiency: float = 1.0
) -> Rates:
    """Rates of a GPU of the table among others.

    Args:
        dtype: of matrix products.
        network: between nodes; None where there is one node.
    """
    best = gpu.achievable_flops[dtype]
    share = link_share(gpu.link_among(gpus_per_node))
    return Rates(
        product_flops_per_s=best,
        attention_flops_per_s=best * ATTENTION_SHARE,
        memory_bytes_per_s=gpu.memory_bandwidth * MEMORY_SHARE,
        dequantize_bytes_per_s=gpu.memory_bandwidth * DEQUANTIZE_SHARE,
        links=Links(
            gpus_per_node,
            gpu.link_bytes_per_s(gpus_per_node) * share,
            None if network is None else network.bytes_per_s * NETWORK_SHARE,
        ),
        host_link_bytes_per_s=gpu.host_link.bytes_per_s * HOST_LINK_SHARE,
        host_memory_bytes_per_s=HOST_MEMORY_BYTES_PER_S / gpus_per_node,
        efficiency=efficiency,
        host=host_of(gpu),
    )
