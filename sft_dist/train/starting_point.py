"""The checkpoint that a run really goes on from: the newest one whose every byte is as it was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, MOVE_AWAY, Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.errors import CheckpointError
from sft_dist.runtime.process_group import gathered

MAX_SHOWN_PROBLEMS = 3


def newest_valid(
    candidates: Sequence[Path], *, own: Path, replace: Callable[[Path], bool] = lambda _: False
) -> Path | None:
    """Reads every file of the candidates until one is whole; every rank must call it, and reads a part of the files.

    A damaged one in ``own`` is set aside under another name, and named.

    Args:
        candidates: checkpoints, the one to be preferred first; without any a run begins.
        own: ``checkpoints/`` of the run.
        replace: called with a damaged one in ``own``, on every rank; whether it is a whole one now.

    Raises:
        CheckpointError: all of them are damaged.
    """
    skipped: dict[Path, str] = {}
    for checkpoint in candidates:
        problems = damage(checkpoint)
        if not problems or (checkpoint.parent.resolve() == own.resolve() and replace(checkpoint)):
            if dist.get_rank() == 0:
                for path, why in skipped.items():
                    _set_aside(path, why, is_own=path.parent.resolve() == own.resolve())
            dist.barrier()
            return checkpoint
        skipped[checkpoint] = "; ".join(problems[:MAX_SHOWN_PROBLEMS])
    if skipped:
        # They keep their names: a run that finds none would begin anew.
        raise CheckpointError(
            "\n".join(f"{path} is damaged: {why}" for path, why in skipped.items()), fix=MOVE_AWAY
        ).everywhere()
    return None


def _set_aside(checkpoint: Path, why: str, *, is_own: bool) -> None:
    kept = f", it is kept as {store.set_aside(checkpoint).name}" if is_own else ""
    line = f"{checkpoint} is damaged and skipped{kept}: {why}"
    Console(highlight=False, stderr=True).print(f"[yellow]{escape(line)}", soft_wrap=True)


def damage(checkpoint: Path) -> list[str]:
    """What is not as it was written, a line each; the same on every rank."""
    try:
        manifest = Manifest.read(checkpoint)
        problems = verify_files(checkpoint, manifest, part=dist.get_rank(), parts=dist.get_world_size())
        if store.step_of(checkpoint.name) not in (None, manifest.completed_steps):
            problems.append(f"its {MANIFEST} is that of step {manifest.completed_steps}")
    except CheckpointError as error:
        problems = [error.what]
    return list(dict.fromkeys(problem for part in gathered(problems) for problem in part))
