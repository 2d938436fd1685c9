"""What a run needs of its machines, as far as that is known without importing torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.errors import UnknownHardware
from sft_dist.plan.machines import machines_of
from sft_dist.plan.to_json import PLAN

# Resident in a process that has imported torch, transformers and DeepSpeed, on a CPU; with CUDA's libraries and context
# `plan/host.py` has the figure. Both measured.
CPU_PROCESS_BYTES = int(0.7 * 2**30)
GPU_PROCESS_BYTES = int(4.5 * 2**30)


@dataclass(frozen=True)
class Wanted:
    """Of each node, but for what lies on shared disks.

    Args:
        output_dir, cache_dir: folders; None: not known, without a configuration.
        gpu: model, as the configuration calls it. gpus: of a node; None: any number, or none.
        processes: of the training on a node; None: one for each GPU.
        stated_memory_gib: of a node, that the configuration counts with.
        network: between nodes, as the configuration calls it.
        host_bytes, disk_parts: what the plan says of a node's memory, and of the disk by what takes it; None: no plan
            of this run is there.
        config: None: what training reads is not known.
        words: of the command line that name it, for what is to be done.
    """

    output_dir: Path | None = None
    cache_dir: Path | None = None
    gpu: str | None = None
    gpus: int | None = None
    processes: int | None = None
    nodes: int | None = None
    stated_memory_gib: float | None = None
    network: str | None = None
    host_bytes: int | None = None
    disk_parts: dict[str, int] | None = None
    config: Config | None = None
    words: tuple[str, ...] = ()


def wanted_of(config: Config | None, words: Sequence[str] = ()) -> Wanted:
    """What a configuration asks for, with the figures of the plan that was written for it."""
    if config is None:
        return Wanted()
    hardware = config.hardware
    output_dir = Path(config.output_dir).absolute()
    memory = _planned_memory(output_dir / PLAN, config)
    cache = output_dir.parent / "data_cache" if config.data.cache_dir is None else Path(config.data.cache_dir)
    on_cpu = config.cluster.request_gpus == "none" or (hardware.gpu is None and hardware.gpus_per_node is None)
    return Wanted(
        output_dir=output_dir,
        cache_dir=cache.expanduser().absolute(),
        gpu=hardware.gpu,
        processes=hardware.gpus_per_node,
        gpus=None if on_cpu else (hardware.gpus_per_node or 1),
        nodes=hardware.nodes,
        stated_memory_gib=hardware.host_memory_gib,
        network=hardware.network,
        host_bytes=None if memory is None else sum(memory["host_parts"].values()),
        disk_parts=None if memory is None else dict(memory["disk_parts"]),
        config=config,
        words=tuple(words),
    )


def _planned_memory(file: Path, config: Config) -> dict[str, Any] | None:
    """Of the plan in the run directory, if it is of this model, method and machines; that of another run says nothing.

    Its fields are those of docs/plan_schema.json.
    """
    if config.hardware.gpu is None:
        return None
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        subject = plan["subject"]
        is_of_this = (
            subject["model"].startswith(f"{config.model.path},")
            and subject["method"] == config.method.type
            and subject["machines"] == machines_of(config.hardware).description
        )
        memory: dict[str, Any] = plan["memory"]
    except (OSError, ValueError, KeyError, UnknownHardware):
        return None
    return memory if is_of_this else None
