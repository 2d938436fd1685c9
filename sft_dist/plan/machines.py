"""The machines that a run is planned for: what the configuration says of them, and what a command line says instead."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.hardware.networks import Network, find_network
from sft_dist.runtime.world import WorldShape

# What machines of a kind are joined by where nobody says it: those that are rented by the node.
USUAL_NETWORKS = {
    "A100": "infiniband-hdr-x8",
    "H": "infiniband-ndr-x8",
    "G": "infiniband-ndr-x8",
    "B": "infiniband-ndr-x8",
    "MI": "infiniband-ndr-x8",
}
OTHER_NETWORK = "ethernet-100g"


@dataclass(frozen=True)
class Machines:
    """GPUs of one kind, as many on each node.

    Args:
        network: between the nodes; None where there is one.
        network_is_assumed: nobody said which.
    """

    gpu: Gpu
    nodes: int
    gpus_per_node: int
    network: Network | None = None
    network_is_assumed: bool = False

    @property
    def shape(self) -> WorldShape:
        """Of the processes, one for each GPU."""
        return WorldShape(self.nodes, self.gpus_per_node)

    @property
    def description(self) -> str:
        """``2 nodes of 8 x H100-SXM``, as a plan says it."""
        node = f"{self.gpus_per_node} x {self.gpu.name}"
        return node if self.nodes == 1 else f"{self.nodes} nodes of {node}"

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def machines_of(hardware: HardwareConfig, *, launched: WorldShape | None = None) -> Machines:
    """What a configuration plans for.

    Args:
        launched: the processes of a launch, which count where the configuration is silent.

    Raises:
        UnknownHardware: GPU or network is not known, or no GPU is named and none is in this machine.
    """
    silent = launched or WorldShape(1, 1)
    gpu = find_gpu(hardware.gpu or _gpu_of_this_machine())
    nodes = hardware.nodes or silent.num_nodes
    said = None if hardware.network is None else find_network(hardware.network)
    return Machines(
        gpu=gpu,
        nodes=nodes,
        gpus_per_node=hardware.gpus_per_node or silent.ranks_per_node,
        network=(said or usual_network(gpu)) if nodes > 1 else None,
        network_is_assumed=said is None and nodes > 1,
    )


def machines_here(hardware: HardwareConfig, shape: WorldShape, device_name: str) -> Machines:
    """What a run that was launched has, whatever the configuration plans for.

    Args:
        device_name: of its GPU, as the driver says it. Where that is not in the table, or may be one of several,
            ``hardware.gpu`` says which it is.

    Raises:
        UnknownHardware: the GPU is not known, or the network.
    """
    try:
        name = find_gpu(device_name).name
    except UnknownHardware:
        if hardware.gpu is None:
            raise
        name = hardware.gpu
    here = {"gpu": name, "nodes": shape.num_nodes, "gpus_per_node": shape.ranks_per_node}
    return machines_of(hardware.model_copy(update=here))


def usual_network(gpu: Gpu) -> Network:
    """What joins machines with this GPU where nobody says it."""
    kinds = (network for kind, network in USUAL_NETWORKS.items() if gpu.name.startswith(kind))
    return find_network(next(kinds, OTHER_NETWORK))


def _gpu_of_this_machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    raise UnknownHardware(
        "hardware.gpu is not set, and this machine has no GPU",
        fix="say which GPU to plan for: hardware.gpu=a100-80gb behind the configuration, or hardware.gpu in it",
    )
