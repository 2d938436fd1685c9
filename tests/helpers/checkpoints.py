"""Checkpoints without tensors, for tests of which one is taken."""

from __future__ import annotations

from pathlib import Path

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, Identity, Manifest, Position


def make_checkpoint(output: Path, step: int, next_sequences: tuple[int, ...] = ()) -> Path:
    """A complete one in the run directory ``output``."""
    folder = store.begin(output / "checkpoints", step)
    manifest = Manifest(
        position=Position(completed_steps=step, next_sequences=next_sequences), strategy="ddp", world_size=1,
        identity=Identity(values={}), tensors={}, files={},
    )  # fmt: skip
    store.write_synced(folder / MANIFEST, manifest.model_dump_json())
    return store.commit(folder)
