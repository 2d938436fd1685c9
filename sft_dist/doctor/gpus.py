"""The GPUs of a node: what NVIDIA's driver says of them, and whether torch can use them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.doctor.finding import Finding
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import find_gpu

GIB = 2**30

# Memory that others hold of a GPU; the driver itself takes less.
TAKEN_BYTES = GIB

# Of nvmlClocksEventReason: the hardware slows down (power brake, heat), the driver does for heat.
HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, HW_POWER_BRAKE = 0x8, 0x20, 0x40, 0x80
SLOWED = {HW_THERMAL: "heat", SW_THERMAL: "heat", HW_POWER_BRAKE: "its power supply", HW_SLOWDOWN: "the hardware"}


@dataclass(frozen=True)
class GpuState:
    """One GPU as the driver sees it.

    Args:
        index: of this process' GPUs, from 0.
        processes: ids of those that use it, of this machine.
        uncorrected_errors: of its memory since it was started; None: it does not count them.
        slowed_by: bits of nvmlClocksEventReason.
    """

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    processes: tuple[int, ...]
    uncorrected_errors: int | None
    slowed_by: int
    temperature_c: int


@dataclass(frozen=True)
class DriverState:
    """Args:
    version: of the driver. cuda: newest version of CUDA that it knows, (major, minor).
    """

    version: str
    cuda: tuple[int, int]
    gpus: tuple[GpuState, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class DriverTrouble(Exception):
    """The driver is there and does not serve."""


def read_driver(env: Mapping[str, str] = os.environ) -> DriverState | None:
    """What the driver says of the GPUs that this process may use; None where there is no driver.

    Needs nvidia-ml-py.

    Raises:
        DriverTrouble: a GPU is lost, or the driver cannot say.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no library of the driver, or no driver in the kernel
        return None
    try:
        newest = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = _visible(pynvml, env.get("CUDA_VISIBLE_DEVICES"))
        return DriverState(
            version=pynvml.nvmlSystemGetDriverVersion(),
            cuda=(newest // 1000, newest % 1000 // 10),
            gpus=tuple(_state(pynvml, index, handle) for index, handle in enumerate(handles)),
        )
    except pynvml.NVMLError as error:
        raise DriverTrouble(f"the driver says: {error}") from None
    finally:
        pynvml.nvmlShutdown()


def driver_is_loaded() -> bool:
    """Whether there is a driver for NVIDIA's GPUs in the kernel."""
    return Path("/proc/driver/nvidia/version").exists()


def driver_by_torch(ready: Mapping[str, Any]) -> DriverState:
    """What torch knows of the GPUs, where nvidia-ml-py is not installed.

    Args:
        ready: what a worker said: ``gpus`` and ``driver_cuda``. It has a context on each of them.
    """
    newest = int(ready["driver_cuda"])
    return DriverState(
        version="not known without nvidia-ml-py",
        cuda=(newest // 1000, newest % 1000 // 10),
        gpus=tuple(
            GpuState(index, gpu["name"], gpu["total"], max(0, gpu["total"] - gpu["free"] - TAKEN_BYTES), (), None, 0, 0)
            for index, gpu in enumerate(ready["gpus"])
        ),
    )


def _visible(pynvml: Any, chosen: str | None) -> list[Any]:
    """Handles of the GPUs that CUDA_VISIBLE_DEVICES leaves, in its order: numbers or UUIDs."""
    if chosen is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    by_name = [word.strip() for word in chosen.split(",") if word.strip()]
    return [
        pynvml.nvmlDeviceGetHandleByIndex(int(word)) if word.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(word)
        for word in by_name
    ]


def _state(pynvml: Any, index: int, handle: Any) -> GpuState:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        errors = pynvml.nvmlDeviceGetTotalEccErrors(
            handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        )
    except pynvml.NVMLError_NotSupported:
        errors = None
    return GpuState(
        index=index,
        name=pynvml.nvmlDeviceGetName(handle),
        total_bytes=int(memory.total),
        used_bytes=int(memory.used),
        processes=tuple(process.pid for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        uncorrected_errors=errors,
        slowed_by=int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        temperature_c=int(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
    )


def check_gpus(node: str, driver: DriverState | None, *, wanted: int | None, model: str | None) -> list[Finding]:
    """GPUs of a node against what the run is to have.

    Args:
        wanted: on each node; None: any number. model: as the configuration calls it.
    """
    there = 0 if driver is None else len(driver.gpus)
    if driver is None and driver_is_loaded():
        fix = "pip install 'sft-dist[gpu]', which has nvidia-ml-py, or leave out --no-speed"
        return [Finding("GPUs", node, "warning", "there are some, but nothing here can look at them", fix)]
    if wanted is not None and there < wanted:
        what = f"{there} of {wanted} GPUs" + (": no driver is loaded" if driver is None else "")
        fix = "see nvidia-smi there; state what the nodes have: hardware.gpus_per_node, or cluster.request_gpus none"
        return [Finding("GPUs", node, "failed", what, fix, there)]
    if driver is None or not driver.gpus:
        return [Finding("GPUs", node, "ok", "none: training is on CPUs", value=0)]
    found = [*_model(node, driver.gpus, model)]
    for gpu in driver.gpus:
        found += _health(node, gpu)
    names = ", ".join(dict.fromkeys(gpu.name for gpu in driver.gpus))
    return found or [Finding("GPUs", node, "ok", f"{there} x {names}, driver {driver.version}", value=there)]


def _model(node: str, gpus: Sequence[GpuState], model: str | None) -> list[Finding]:
    if model is None:
        return []
    planned = find_gpu(model)
    for gpu in gpus:
        try:
            there = find_gpu(gpu.name).name
        except UnknownHardware as error:
            if planned.name in error.what:  # may be one of several: one of them is meant
                continue
            there = gpu.name
        if there == planned.name:
            continue
        is_smaller = gpu.total_bytes < planned.usable_bytes
        what = f"GPU {gpu.index} is {gpu.name}, planned for {planned.name}"
        fix = f"ask for nodes with {planned.name} (cluster.gpu_type, constraint), or plan with hardware.gpu={there}"
        return [Finding("GPU model", node, "failed" if is_smaller else "warning", what, fix, gpu.name)]
    return []


def _health(node: str, gpu: GpuState) -> list[Finding]:
    found = []
    if gpu.processes or gpu.used_bytes > TAKEN_BYTES:
        who = f"processes {', '.join(map(str, gpu.processes))}" if gpu.processes else "somebody"
        what = f"GPU {gpu.index}: {who} hold {gpu.used_bytes / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB"
        fix = "end them; if nobody runs there, the processes of an earlier job were left: nvidia-smi, then kill"
        level = "failed" if gpu.used_bytes > TAKEN_BYTES else "warning"
        found.append(Finding("GPU memory", node, level, what, fix, gpu.used_bytes / GIB))  # type: ignore[arg-type]
    if gpu.uncorrected_errors:
        what = f"GPU {gpu.index}: {gpu.uncorrected_errors} errors of its memory that could not be corrected (ECC)"
        fix = "drain the node and have the GPU reset or exchanged: nvidia-smi -q -d ECC,ROW_REMAPPER"
        found.append(Finding("GPU errors", node, "failed", what, fix, gpu.uncorrected_errors))
    causes = dict.fromkeys(cause for bit, cause in SLOWED.items() if gpu.slowed_by & bit)
    if causes:
        what = f"GPU {gpu.index} is slowed down by {' and '.join(causes)}, at {gpu.temperature_c} C"
        fix = "have its cooling and power looked at: nvidia-smi -q -d PERFORMANCE"
        found.append(Finding("GPU clock", node, "warning", what, fix, gpu.temperature_c))
    return found


def check_torch(node: str, torch: Mapping[str, Any], driver: DriverState | None) -> list[Finding]:
    """Whether torch, its CUDA and the driver go together.

    Args:
        torch: what a worker said of it: ``version``, ``cuda`` (text or None), ``nccl``, ``devices`` (a number).
    """
    built, devices = torch["cuda"], torch["devices"]
    name = f"torch {torch['version']}"
    if driver is None or not driver.gpus:
        what = f"{name}, CUDA {built} unused: no GPU here" if built else f"{name} for CPUs; no GPU here"
        return [Finding("torch and driver", node, "ok", what)]
    if built is None:
        fix = "install torch for CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu130"
        return [Finding("torch and driver", node, "failed", f"{name} is for CPUs, and there are GPUs", fix)]
    # Within a major version newer toolkits run on older drivers (CUDA Compatibility, minor version compatibility).
    if int(built.split(".")[0]) > driver.cuda[0]:
        newest = f"{driver.cuda[0]}.{driver.cuda[1]}"
        what = f"{name} is built for CUDA {built}; driver {driver.version} knows up to {newest}"
        fix = f"install a newer driver, or torch for CUDA {driver.cuda[0]}"
        return [Finding("torch and driver", node, "failed", what, fix, driver.version)]
    if devices < len(driver.gpus):
        what = f"{name} sees {devices} of {len(driver.gpus)} GPUs{_because(torch)}"
        fix = "python -c 'import torch; torch.cuda.init()' says why; often the driver's modules differ from its library"
        return [Finding("torch and driver", node, "failed", what, fix, devices)]
    what = f"{name}, CUDA {built}, NCCL {torch['nccl']}, driver {driver.version}"
    return [Finding("torch and driver", node, "ok", what)]


def _because(torch: Mapping[str, Any]) -> str:
    return f": {torch['error']}" if torch.get("error") else ""
