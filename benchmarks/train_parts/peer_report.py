"""What a peer's run on Transformers' Trainer tells of itself; a peer's script imports it from beside itself."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from peer_memory import peak_bytes
from transformers import TrainerCallback

COMMON = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")


class Clock(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())


def write_report(task: dict[str, Any], peer: str, clock: Clock, losses: list[float]) -> None:
    """
    Args:
        losses: of every micro-batch, each divided by its step's supervised tokens already.
    """
    count = task["accumulation"]
    report = {
        "losses": [sum(losses[i : i + count]) for i in range(0, len(losses), count)], "ends": clock.ends,
        "started": psutil.Process().create_time(), "peak_bytes": peak_bytes(),
        "versions": {name: importlib.metadata.version(name) for name in (peer, *COMMON)},
    }  # fmt: skip
    Path(task["report"]).write_text(json.dumps(report))
