"""Checkpoints without tensors, for tests of which one is taken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, Identity, Manifest, Position


def make_checkpoint(output: Path, step: int, next_sequences: tuple[int, ...] = ()) -> Path:
    """A complete one in the run directory ``output``."""
    folder = store.begin(output / "checkpoints", step)
    manifest = Manifest(
        position=Position(completed_steps=step, next_sequences=next_sequences), strategy="ddp", world_size=1,
        identity=Identity(values={}), tensors={}, files={},
    )  # fmt: skip
    store.write_synced(folder / MANIFEST, manifest.text())
    return store.commit(folder)


def edit_manifest(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a manifest as the one who writes it could have: its digest is right."""
    content = json.loads((checkpoint / MANIFEST).read_text())
    del content["digest"]
    change(content)
    (checkpoint / MANIFEST).write_text(Manifest.model_validate(content).text())


def numbers_of(output: Path) -> list[dict[str, float]]:
    """Of each step that a run's metrics.jsonl has what its resumed twin must have, too; a dying process may leave half a
    line."""
    if not (output / "metrics.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines if "event" not in line]


def final_bytes(output: Path) -> dict[str, bytes]:
    """The weights of ``final/``, by file; there are some."""
    found = {path.name: path.read_bytes() for path in (output / "final").glob("*.safetensors")}
    assert found
    return found


def flip(path: Path, place: int = -1) -> None:
    """Changes one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
