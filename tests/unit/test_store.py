"""The folder of checkpoints: what a manifest vouches for, in which order things reach the disk, what cannot be removed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, Manifest
from sft_dist.checkpoint.shard_file import Piece, write_shard
from sft_dist.errors import CheckpointError
from tests.helpers.checkpoints import edit_manifest, make_checkpoint
from tests.helpers.disks import locked


def test_a_manifest_is_as_it_was_written_or_it_is_none(tmp_path: Path) -> None:
    """Whatever byte is another one, in whatever value: a range, a step, a digest, or between them."""
    folder = make_checkpoint(tmp_path, 3, (4, 5))
    file = folder / MANIFEST
    before = file.read_bytes()
    assert Manifest.read(folder).position.next_sequences == (4, 5)
    for place in range(len(before)):
        for bit in (0, 3, 7):
            changed = bytearray(before)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
                Manifest.read(folder)
    for length in range(len(before)):
        file.write_bytes(before[:length])
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
            Manifest.read(folder)
    file.write_bytes(before)
    edit_manifest(folder, lambda content: content["position"].update(completed_steps=4))
    assert Manifest.read(folder).completed_steps == 4


def test_a_shard_is_on_the_disk_when_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it: what is synced before the last byte is written may be lost."""
    synced: list[int] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", watched)
    record = write_shard(tmp_path / "shard", {"weight": Piece(0, torch.ones(70))})
    assert synced == [record.num_bytes] == [(tmp_path / "shard").stat().st_size]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then the folder with their names, then the name of the folder, then what that name is in."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        done.append("sync " + os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        fsync(descriptor)

    def renamed(path: Path, target: Any) -> Path:
        done.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    make_checkpoint(tmp_path, 3)
    unfinished = "checkpoints/step-00000003.unfinished"
    assert done == [
        f"sync {unfinished}/{MANIFEST}", f"sync {unfinished}", "rename step-00000003.unfinished", "sync checkpoints", "sync ."
    ]  # fmt: skip


def test_what_cannot_be_swept_up_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    left = store.begin(folder, 3)
    (left / "shard").touch()
    with locked(left), pytest.raises(CheckpointError) as caught:
        store.sweep(folder)
    assert caught.value.what.startswith(f"{left} was left by a run that was ended, and cannot be removed: ")
    assert str(folder) in caught.value.fix
    store.sweep(folder)
    assert not left.exists()


def test_what_a_failed_save_could_not_remove_goes_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    kept = [make_checkpoint(tmp_path, 1), store.set_aside(make_checkpoint(tmp_path, 2))]
    make_checkpoint(tmp_path, 3).rename(folder / "step-00000003.deleted")
    store.begin(folder, 4)
    kept.append(store.begin(folder, 5))
    assert sorted(folder.iterdir()) == sorted(kept)
