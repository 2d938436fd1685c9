"""What one node finds out by itself, while its workers import torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from sft_dist.config.schema import Config
from sft_dist.doctor.deadline import Overdue, all_within
from sft_dist.doctor.disks import Disk, check_disk, check_hub_cache, disks_of
from sft_dist.doctor.finding import Finding
from sft_dist.doctor.gpus import DriverState, check_gpus
from sft_dist.doctor.inputs import check_inputs
from sft_dist.doctor.machine import check_cores, check_limits, check_memory, check_shared_memory
from sft_dist.doctor.names import check_port, resolve
from sft_dist.doctor.place import Place
from sft_dist.doctor.versions import installed
from sft_dist.doctor.wanted import Wanted
from sft_dist.runtime.failure import with_config

DRIVER_FIX = "drain and restart the node; dmesg says what happened (Xid)"

Found = tuple[list[Finding], dict[str, Any]]


def look(
    place: Place, wanted: Wanted, driver: DriverState | Exception | None, *, hosts: tuple[str, ...], deadline: float
) -> dict[str, Any]:
    """Findings and facts of this node, ready for JSON.

    Args:
        driver: what it says of this node's GPUs, or what is wrong with it.
        hosts: names of all nodes.
        deadline: of ``time.monotonic``: what has not answered by then is a finding.
    """
    trouble = driver if isinstance(driver, Exception) else None
    driver = driver if isinstance(driver, DriverState) else None
    num_gpus = 0 if driver is None else len(driver.gpus)
    num_processes = wanted.processes or wanted.gpus or num_gpus or 1
    world_size = place.size * num_processes
    node = place.name
    calls: dict[str, Callable[[], Found]] = {
        "GPUs": lambda: (check_gpus(node, driver, wanted=wanted.gpus, model=wanted.gpu), {"gpus": _gpu_facts(driver)}),
        "memory": partial(
            _only, partial(check_memory, node, wanted, num_processes=num_processes, on_gpus=num_gpus > 0)
        ),
        "/dev/shm": partial(_only, partial(check_shared_memory, node, num_gpus=num_gpus)),
        "limits": partial(_only, partial(check_limits, node, world_size=world_size)),
        "cores": partial(_only, partial(check_cores, node, num_processes=num_processes)),
        "hub cache": lambda: (check_hub_cache(node, hub_cache()), {}),
        "versions": lambda: ([], {"versions": installed()}),
        "host names": lambda: ([], {"names": resolve(hosts) if len(hosts) > 1 else {}}),
    }
    if wanted.config is not None:
        calls["inputs"] = partial(_only, partial(_inputs, node, wanted.config, wanted.words))
    for disk in disks_of(wanted):
        calls[disk.what] = partial(_disk, node, disk)
    if place.index == 0:
        calls["port"] = partial(_only, partial(check_port, node, place.training_port))
    findings = [] if trouble is None else [Finding("GPU driver", node, "failed", str(trouble), DRIVER_FIX)]
    facts: dict[str, Any] = {}
    for check, answer in all_within(deadline - time.monotonic(), calls).items():
        if isinstance(answer, Overdue):
            fix = "see what hangs: a file system that does not answer (df, dmesg), or a name server"
            findings.append(Finding(check, node, "failed", f"{answer}: it hangs", fix))
        elif isinstance(answer, Exception):
            raise answer
        else:
            findings += answer[0]
            facts |= answer[1]
    return {"findings": [asdict(finding) for finding in findings], "facts": facts}


def _inputs(node: str, config: Config, words: Sequence[str]) -> list[Finding]:
    return [replace(each, fix=with_config(each.fix, words)) for each in check_inputs(node, config)]


def _only(check: Callable[[], list[Finding]]) -> Found:
    return check(), {}


def _disk(node: str, disk: Disk) -> Found:
    findings, rate = check_disk(node, disk)
    return findings, {} if rate is None else {f"{disk.what} bytes_per_s": round(rate)}


def _gpu_facts(driver: DriverState | None) -> Mapping[str, Any] | None:
    return None if driver is None else driver.to_json()


def hub_cache(env: Mapping[str, str] = os.environ) -> Path:
    """Where huggingface_hub keeps models; it takes a second to import."""
    home = env.get("HF_HOME") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(env.get("HF_HUB_CACHE") or Path(home) / "hub")
