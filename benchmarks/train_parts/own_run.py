"""A run of this project through its command, with a task's report beside it.

What every run imports is imported before the command begins, so that the report has apart what imports take.

python -m benchmarks.train_parts.own_run CONFIG REPORT THREADS [key=value ...]
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import psutil


def main(config: Path, report: Path, threads: int, overrides: list[str]) -> None:
    import torch

    import sft_dist.train.run  # noqa: F401
    from benchmarks.train_parts.machine import own_versions
    from benchmarks.train_parts.peer_memory import peak_bytes
    from sft_dist.cli import main as command
    from sft_dist.train.loop import Training

    imported = time.time()
    torch.set_num_threads(threads)
    begins, ends, train_step = [], [], Training._train_step

    def timed(self: Training) -> None:
        begins.append(time.time())
        train_step(self)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.time())

    Training._train_step = timed  # type: ignore[method-assign]
    try:
        command(["train", str(config), *overrides])
    except SystemExit as end:
        if end.code:
            raise
    import yaml

    chosen = [each.partition("=")[2] for each in overrides if each.startswith("output_dir=")]
    folder = Path(chosen[-1] if chosen else yaml.safe_load(config.read_text())["output_dir"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rank = os.environ.get("RANK", "0")
    if torch.cuda.is_available():
        from sft_dist.config.load import load_config
        from sft_dist.resolve import resolve
        from sft_dist.runtime.world import WorldShape
        from sft_dist.train.probe import planned_peak_bytes

        planned = planned_peak_bytes(resolve(load_config(config, overrides), WorldShape()))
    else:
        planned = None
    measured = {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "data_wait_s": [line["data_wait_s"] for line in lines if "data_wait_s" in line],
        "started": psutil.Process().create_time(), "imported": imported, "begins": begins, "ends": ends,
        "peak_bytes": peak_bytes(), "planned_bytes": planned,
        "versions": own_versions(),
    }  # fmt: skip
    report.with_name(report.name if rank == "0" else f"{report.stem}-{rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
