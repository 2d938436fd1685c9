"""What a resumed run says before its first step, so that a person can see that it goes on where it was."""

from __future__ import annotations

from pathlib import Path

from sft_dist.checkpoint.manifest import Manifest, Position
from sft_dist.plan.units import duration
from sft_dist.run import Run

MAX_SHOWN_SEQUENCES = 8


def resume_receipt(checkpoint: Path, manifest: Manifest, run: Run, now: Position, *, num_steps: int) -> list[str]:
    """Lines of text.

    Args:
        manifest: of the checkpoint.
        now: where the resumed run is, by its own data, schedule and seed.
    """
    then, completed = manifest.position, now.completed_steps
    lines = [
        f"resumed   {checkpoint}: {completed:,} steps and {duration(then.trained_s)} are behind it; "
        f"its shards of {_place(manifest.strategy, manifest.world_size)} go to {_place(run.strategy, run.world.size)}"
    ]
    if then.skipped_steps:
        shown = ", ".join(f"{step:,}" for step in then.skipped_steps[-MAX_SHOWN_SEQUENCES:])
        lines.append(
            f"without   {len(then.skipped_steps):,} steps that were left out (spikes), the last of them {shown}"
        )
    if now.next_lr is None:
        return [*lines, f"next      nothing: all {num_steps:,} steps are trained"]
    shown = ", ".join(map(str, now.next_sequences[:MAX_SHOWN_SEQUENCES]))
    more = len(now.next_sequences) - MAX_SHOWN_SEQUENCES
    sequences = shown + (f" and {more} more" if more > 0 else "")
    lines.append(
        f"next      step {completed + 1:,} of {num_steps:,}: sequences {sequences}; "
        f"lr {now.next_lr:.4g}; random numbers {now.next_rng}"
    )
    return lines


def differences(manifest: Manifest, now: Position) -> list[str]:
    """What goes on otherwise than it would have without a stop, though nothing forbids it; lines of text."""
    then = manifest.position
    lines = []
    if then.next_lr is not None and now.next_lr is not None and then.next_lr != now.next_lr:
        lines.append(f"lr of step {now.completed_steps + 1:,}: {then.next_lr:.4g} -> {now.next_lr:.4g}")
    if then.next_rng is not None and then.next_rng != now.next_rng:
        lines.append("random numbers: this version of torch, or this seed, draws others, so dropout differs")
    return lines


def _place(strategy: str, world_size: int) -> str:
    return f"{strategy} on {world_size} process{'es' if world_size > 1 else ''}"
