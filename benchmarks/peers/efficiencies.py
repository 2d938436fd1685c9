"""The rows of ``hardware/step_efficiency.yaml`` that published steps give: ideal seconds over measured ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.peers.setup import words
from benchmarks.peers.speed import Timed


def efficiencies(rows: Sequence[Timed]) -> list[dict[str, Any]]:
    """By GPU, method and kernels: the median and the range of the efficiencies at which a step is as long as measured.

    Rows of one GPU where there are any; of several otherwise, whose links and units the plan's arithmetic takes off.
    float8 and offloaded steps do not count.
    """
    groups: dict[tuple[str, str, str], list[Timed]] = defaultdict(list)
    for timed in rows:
        if not timed.setup.float8 and not timed.setup.offload:
            groups[_key(timed)].append(timed)
    table = []
    for (gpu, method, kernels), group in sorted(groups.items()):
        alone = [timed for timed in group if timed.setup.world == 1]
        found = [timed.efficiency() for timed in alone or group]
        table.append({
            "gpu": gpu, "method": method, "kernels": kernels, "value": round(float(np.median(found)), 2),
            "low": round(min(found), 2), "high": round(max(found), 2), "runs": len(found),
            "gpus": "one" if alone else "several",
        })  # fmt: skip
    return table


def _key(timed: Timed) -> tuple[str, str, str]:
    setup = timed.setup
    method = "qlora" if setup.quant else "full" if setup.method == "full" else "lora"
    fused = setup.norm == "fused" or "te" in words(timed.row, "kernels").split()
    return timed.gpu.name.split("-")[0], method, "compiled" if setup.compiled else "fused" if fused else "eager"
