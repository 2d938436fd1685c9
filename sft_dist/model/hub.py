"""Where a model's files are: a folder, or the local hub cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download


def model_folder(path: str, revision: str | None) -> Path:
    """The folder itself, or the snapshot of a hub id."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path, revision=revision))
