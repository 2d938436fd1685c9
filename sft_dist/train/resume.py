"""Which checkpoint a run goes on from, as ``--resume`` says."""

from __future__ import annotations

from pathlib import Path

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import Manifest
from sft_dist.data.loader import TrainingOrder
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.train.preflight import AUTO, NEVER, holds_a_run


def checkpoints_folder(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints"


def find_checkpoint(resume: str, output_dir: str) -> Path | None:
    """The checkpoint to go on from; None: from the beginning.

    Args:
        resume: ``never``; ``auto``: the newest complete one of the run directory, if there is any; or a path.

    Raises:
        ConfigError: the path is behind the run in ``output_dir``, or that run is another one.
        CheckpointError: the path is no checkpoint.
    """
    folder = checkpoints_folder(output_dir)
    own = store.complete_checkpoints(folder)
    if resume == NEVER:
        return None
    if resume == AUTO:
        return own[-1] if own else None
    wanted = Path(resume)
    completed = Manifest.read(wanted).completed_steps
    is_own = wanted.resolve().parent == folder.resolve()
    if not is_own and holds_a_run(Path(output_dir)):
        raise ConfigError(
            f"--resume {resume} is of another run than the one that output_dir {output_dir} holds",
            fix="set another output_dir, where the run goes on from that checkpoint",
        )
    newer = [path for path in own if int(path.name.removeprefix("step-")) > completed]
    if newer:
        raise ConfigError(
            f"--resume {resume}: output_dir has a newer checkpoint, {newer[-1].name}, which this run would contradict",
            fix=f"set another output_dir, or say --resume {AUTO}, or move the newer checkpoints away",
        )
    return wanted


def check_position(manifest: Manifest, order: TrainingOrder, *, num_steps: int, checkpoint: Path) -> None:
    """The next step must train the sequences that the checkpoint expects.

    Raises:
        ConfigError: the run would end before the checkpoint.
        CheckpointError: the order of the data is another one.
    """
    completed = manifest.completed_steps
    if completed > num_steps:
        raise ConfigError(
            f"{checkpoint} has {completed} steps behind it, but the run is {num_steps} steps long",
            fix="raise train.max_steps or train.num_epochs, or resume from an earlier checkpoint",
        )
    # Empty: the run ended there, and is now longer.
    if completed < num_steps and manifest.next_sequences:
        following = tuple(order.step(completed).sequences.tolist())
        if following != manifest.next_sequences:
            raise CheckpointError(
                f"{checkpoint}: step {completed + 1} would train other sequences than those it was to train",
                fix="resume with the version of sft_dist and numpy that wrote it",
            )
