"""How much memory a run has taken; of no package, so that a peer's script can import it from beside itself."""

from __future__ import annotations

from pathlib import Path

import torch


def peak_bytes() -> int:
    """Most that torch has handed out of a GPU; without one, most that this process has had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
