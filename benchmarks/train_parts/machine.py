"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

DISTRIBUTIONS = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "deepspeed")


def cpu_name() -> str:
    """As Linux tells it; elsewhere the kind of processor alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def own_versions() -> dict[str, str]:
    """Of what this project trains with, by distribution."""
    return {name: importlib.metadata.version(name) for name in DISTRIBUTIONS}
