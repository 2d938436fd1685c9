"""The run directory: claimed before anything expensive starts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sft_dist.errors import ConfigError

# Any of these means that a run has trained here.
MARKS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "final")


def check_run_directory(folder: Path) -> None:
    """Makes the folder, and proves that it can be written and holds no other run.

    Raises:
        ConfigError: it is used, or cannot be written.
    """
    used = next((name for name in MARKS_OF_A_RUN if (folder / name).exists()), None)
    if used:
        raise ConfigError(
            f"output_dir: {folder} already holds a run (it has {used})",
            fix="set another output_dir, or move that folder away",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({e.strerror or e})",
            fix="set output_dir to a folder you may write",
        ) from e
