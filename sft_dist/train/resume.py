"""Which checkpoint a run goes on from, as ``--resume`` says. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, Identity, Manifest
from sft_dist.config.flat import flat
from sft_dist.config.schema import Config
from sft_dist.config.text import read_yaml
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.runtime.world import restarts
from sft_dist.train.asked import AUTO, NEVER

if TYPE_CHECKING:
    from sft_dist.data.loader import TrainingOrder

# Any of these means that a run has trained here.
MARKS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "final")

# Of the identity.
DECIDE_THE_ORDER = {"data.train", "train.seed", "train.global_batch_size"}

# Where a run is, what watches it and what it was planned and billed for change nothing about the run.
PLACES = ("output_dir", "logging.", "watchdog.", "hardware.", "checkpoint.mirror")


def resume_after_restart(resume: str, output_dir: str) -> str:
    """What ``--resume`` means in a process that was started again: to go on with what this launch has trained.

    Until this launch has saved, a run that branched off goes on from its PATH once more.
    """
    if resume == NEVER or store.complete_checkpoints(checkpoints_folder(output_dir)):
        return AUTO
    return resume


def holds_a_run(folder: Path) -> bool:
    """Whether a run has trained here, to the end or not."""
    return any((folder / mark).exists() for mark in MARKS_OF_A_RUN)


def config_of(run: Path) -> Path:
    """The configuration that a run wrote into its folder.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is no folder of a run: it has no config.yaml", fix="give the output_dir of a run")
    return path


def checkpoints_folder(output_dir: str) -> Path:
    return Path(output_dir) / "checkpoints"


def find_checkpoints(resume: str, output_dir: str) -> list[Path]:
    """The checkpoints to go on from, the newest first; none: from the beginning.

    Args:
        resume: ``never``; ``auto``: the complete ones of the run directory, if there are any; or a path.

    Raises:
        ConfigError: the path is no checkpoint, or behind the run in ``output_dir``, or that run is another one, or is
            finished.
        CheckpointError: the manifest of the checkpoint at the path is damaged.
    """
    folder = checkpoints_folder(output_dir)
    own = store.complete_checkpoints(folder)
    if resume == NEVER:
        return []
    if resume == AUTO:
        if not own and (Path(output_dir) / "final").exists():
            raise ConfigError(
                f"--resume {AUTO}: {output_dir} has final/ of a finished run and no checkpoint to go on from",
                fix="set another output_dir",
            )
        return own[::-1]
    wanted = Path(resume)
    if not (resume and (wanted / MANIFEST).is_file()):
        there = ", ".join(path.name for path in own) or "none"
        raise ConfigError(
            f"--resume {resume or '(empty)'}: no such checkpoint",
            fix=f"say {AUTO} or {NEVER}, or give the folder of a checkpoint; in {folder} there are: {there}",
        )
    completed = Manifest.read(wanted).completed_steps
    is_own = wanted.resolve().parent == folder.resolve()
    if not is_own and holds_a_run(Path(output_dir)) and not restarts():
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
    return [wanted]


def changed_settings(checkpoint: Path, config: Config) -> list[str]:
    """``key: before -> now`` for every setting that is not what it was when the checkpoint was written.

    Those that decide what a run learns are refused before (``Identity``); these are for the user to know.
    """
    before = dict(flat(read_yaml((checkpoint / "config.yaml").read_text(encoding="utf-8"))))
    now = dict(flat(config.model_dump(mode="json")))
    keys = sorted(key for key in before.keys() | now.keys() if not key.startswith(PLACES))
    return [f"{key}: {before.get(key)} -> {now.get(key)}" for key in keys if before.get(key) != now.get(key)]


def check_position(
    checkpoint: Path, identity: Identity, order: TrainingOrder, *, num_steps: int, allowed: Collection[str] = ()
) -> int:
    """Compares a checkpoint with the run that is to go on from it, before anything expensive is built.

    Args:
        identity: of this run.
        order: of its data: the next step must train the sequences that the checkpoint expects.
        allowed: names of its identity that may differ. Where that changes the order of the data, the run goes on with
            the same step of the other order.

    Returns:
        the steps that are behind the checkpoint.

    Raises:
        ConfigError: it belongs to another run, or the run would end before it.
        CheckpointError: it is damaged, or the order of the data is another one.
    """
    manifest = Manifest.read(checkpoint)
    manifest.identity.require_same(identity, checkpoint=checkpoint, allowed=allowed)
    completed, position = manifest.completed_steps, manifest.position
    if completed > num_steps:
        raise ConfigError(
            f"{checkpoint} has {completed} steps behind it, but the run is {num_steps} steps long",
            fix="raise train.max_steps or train.num_epochs, or branch off: --resume PATH of an earlier checkpoint and "
            "another output_dir",
        )
    is_same_order = not DECIDE_THE_ORDER & set(manifest.identity.differences(identity))
    # Empty: the run ended there, and is now longer.
    if completed < num_steps and position.next_sequences and is_same_order:
        following = tuple(order.step(completed).sequences.tolist())
        if following != position.next_sequences:
            raise CheckpointError(
                f"{checkpoint}: step {completed + 1} would train other sequences than those it was to train",
                fix="resume with the version of sft_dist and numpy that wrote it",
            )
    return completed
