"""What the host does before a GPU can work: seconds of operators, sharded units and updated tensors.

The figures were measured by ``python -m benchmarks.host_time`` with torch 2.13 on one core of an AMD EPYC with Zen 5
cores, which ran at about 2.2 GHz in a virtual machine and did no CUDA. ``hardware/hosts.yaml`` says how much slower the
hosts of a GPU are.
"""

from __future__ import annotations

from dataclasses import dataclass

from sft_dist.hardware.gpus import Gpu
from sft_dist.hardware.tables import shipped_table
from sft_dist.plan.tape import Work

# An operator that reaches the dispatcher, views included, with its share of modules and autograd: forward and backward
# of decoder layers took 2.4 to 2.6 us an operator.
OPERATOR_S = 2.5e-6
# What CUDA adds where it starts a kernel: cudaLaunchKernel takes 1 to 3 us, picking one and memory for it as long
# (jiahuanglin.xyz, "From PyTorch op to kernel launch": 5 to 25 us in all).
LAUNCH_S = 3e-6
# A tensor in clipping and AdamW.
FUSED_TENSOR_S, FOREACH_TENSOR_S = 5.2e-6, 14e-6


@dataclass(frozen=True)
class Units:
    """What a sharding strategy does on the host around each of its units, on the measured host.

    Args:
        open_s: before a pass, to gather; close_s: behind a forward; reduce_s: behind a backward.
        in_flight: gathered at a time, until the host waits for the GPU to be done with the oldest; None: it never does.
        recomputes: a unit is opened and closed once more in backward, by a reentrant checkpoint around it.
    """

    open_s: float = 0.0
    close_s: float = 0.0
    reduce_s: float = 0.0
    in_flight: int | None = None
    recomputes: bool = False


WHOLE = Units()
# What CUDA and NCCL add to a unit's collective: memory of another stream, events, the launch. Torch 2.1's FSDP1 took
# 235 us from the end of waiting to a gather's launch (github.com/pytorch/pytorch/pull/108234); without CUDA 35 us
# here, 67 on a host of that time. FSDP2's forward hook was seen to take 1 ms (pytorch/pytorch/issues/173680).
COLLECTIVE_S = (235e-6 / 1.9) - 35e-6
# 162 to 173 us forward, 246 to 275 us backward; how they divide between both ends of a pass is assumed. Two in flight:
# torch/distributed/fsdp/_limiter_utils.py.
FSDP1 = Units(100e-6 + COLLECTIVE_S, 70e-6, 160e-6 + COLLECTIVE_S, in_flight=2)
# 156 to 163 us forward, 215 to 275 us backward.
FSDP2 = Units(90e-6 + COLLECTIVE_S, 70e-6, 140e-6 + COLLECTIVE_S)


@dataclass(frozen=True)
class Host:
    """The processor that drives a GPU.

    Args:
        slowdown: its seconds over those of the measured one.
        processor, source: what that rests on.
    """

    slowdown: float = 1.0
    processor: str = "the measured one"
    source: str = "benchmarks/host_time.py"

    def seconds(self, work: Work) -> float:
        """To ask the GPU for some work."""
        return self.slowdown * (work.operators * OPERATOR_S + work.kernels * LAUNCH_S)


MEASURED = Host()


def host_of(gpu: Gpu) -> Host:
    """What drives a GPU in the machines that it is sold in."""
    table = shipped_table("hosts.yaml")
    for row in table["hosts"]:
        if gpu.name.startswith(row["gpu"]):
            return Host(row["slowdown"], row["processor"], "; ".join(table["sources"][s] for s in row["sources"]))
    assumed = table["assumed"]
    return Host(assumed["slowdown"], assumed["processor"], "assumed")
