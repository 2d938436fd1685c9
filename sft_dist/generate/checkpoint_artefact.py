"""Makes of a checkpoint the artefact that its run would have ended with there."""

from __future__ import annotations

from pathlib import Path


def artefact_of_checkpoint(checkpoint: Path, folder: Path) -> Path:
    raise NotImplementedError
