"""What this machine computes with, read without any library of its maker."""

from __future__ import annotations

import platform
import re
from pathlib import Path

PROC = Path("/proc")


def cpu_name(proc: Path = PROC) -> str:
    """As the system calls it; on systems without ``/proc``, its architecture."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(proc / "cpuinfo"), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def driver_version(proc: Path = PROC) -> str | None:
    """Of NVIDIA's driver; None where none is loaded."""
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _text(proc / "driver/nvidia/version"))
    return found.group(1) if found else None


def gpu_names(proc: Path = PROC) -> list[str]:
    """Of all of NVIDIA's GPUs of this machine, each model once; none where the driver does not tell."""
    texts = [_text(path) for path in sorted((proc / "driver/nvidia/gpus").glob("*/information"))]
    names = [found.group(1).strip() for text in texts if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]
    return list(dict.fromkeys(names))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
