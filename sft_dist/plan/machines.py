"""The machines that a run is planned for: what the configuration says of them, and what a command line says instead."""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import Gpu, find_gpu
from sft_dist.runtime.world import WorldShape


@dataclass(frozen=True)
class Machines:
    """GPUs of one kind, as many on each node."""

    gpu: Gpu
    nodes: int
    gpus_per_node: int

    @property
    def shape(self) -> WorldShape:
        """Of the processes, one for each GPU."""
        return WorldShape(self.nodes, self.gpus_per_node)

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def machines_of(hardware: HardwareConfig, *, launched: WorldShape | None = None) -> Machines:
    """What a configuration plans for.

    Args:
        launched: the processes of a launch, which count where the configuration is silent.

    Raises:
        UnknownHardware: the GPU is not known, or none is named and none is in this machine.
    """
    silent = launched or WorldShape(1, 1)
    return Machines(
        gpu=find_gpu(hardware.gpu or _gpu_of_this_machine()),
        nodes=hardware.nodes or silent.num_nodes,
        gpus_per_node=hardware.gpus_per_node or silent.ranks_per_node,
    )


def _gpu_of_this_machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    raise UnknownHardware(
        "hardware.gpu is not set, and this machine has no GPU",
        fix="say which GPU to plan for: --gpu a100-80gb, or hardware.gpu in the file",
    )
