"""What rank 0 does for all: the others wait for it, and a failure of it is theirs too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from sft_dist import errors
from sft_dist.errors import SftError
from sft_dist.runtime import process_group
from sft_dist.runtime.process_group import run_on_main_first
from sft_dist.runtime.world import World, WorldShape
from tests.helpers.pool import WorldPool

Worlds = Callable[[int], WorldPool]


def main_first(folder: str, kind: str | None, key: str) -> tuple[str, str, str] | str:
    """Rank 0 takes a moment over its work, then leaves a file or fails; what every rank saw of it."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def work() -> None:
        (Path(folder) / f"worked-{rank}").touch()
        time.sleep(0.2)
        if kind == "ZeroDivisionError":
            raise ZeroDivisionError("by zero")
        if kind is not None:
            raise getattr(errors, kind)("row 3 is bad", fix="mend it")
        (Path(folder) / "done").touch()

    store = dist.PrefixStore(key, _get_default_store())
    try:
        with patch.object(process_group, "PREPARE_TIMEOUT", timedelta(seconds=20)):
            run_on_main_first(World(rank, rank, WorldShape(1, size)), store, "work", work)
    except SftError as e:
        return type(e).__name__, e.what, e.fix
    except ZeroDivisionError as e:
        return str(e)
    return "done" if (Path(folder) / "done").exists() else "did not wait"


def test_the_others_wait_for_rank_0(world: Worlds, tmp_path: Path) -> None:
    assert world(2).run(main_first, str(tmp_path), None, "waits") == ["done"] * 2
    assert {p.name for p in tmp_path.iterdir()} == {"worked-0", "done"}, "rank 0 alone works"


@pytest.mark.parametrize("kind", ["ConfigError", "DataError", "CheckpointError"])
def test_a_mistake_that_rank_0_finds_is_raised_on_all(world: Worlds, tmp_path: Path, kind: str) -> None:
    """With its kind, which decides the exit code, and its words, so that it is told once."""
    assert world(2).run(main_first, str(tmp_path), kind, kind) == [(kind, "row 3 is bad", "mend it")] * 2


def test_a_defect_on_rank_0_ends_all(world: Worlds, tmp_path: Path) -> None:
    first, *others = world(2).run(main_first, str(tmp_path), "ZeroDivisionError", "defect")
    assert first == "by zero"
    assert others == [("SftError", "rank 0 failed: ZeroDivisionError('by zero')", "see its trace")]


def test_a_run_alone_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that seems to be there would make accelerate wait for other ranks, in a program that goes on."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    before, world = dict(os.environ), World(0, 0, WorldShape(1, 1))
    with process_group.process_group(world, torch.device("cpu"), process_group.join(world)):
        assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed reads it"
        assert dist.get_world_size() == 1
    assert dict(os.environ) == before
