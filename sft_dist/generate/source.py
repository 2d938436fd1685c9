"""What the PATH of ``chat`` and ``serve`` stands for. Imports no torch, so that a wrong path is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sft_dist.checkpoint.manifest import MANIFEST
from sft_dist.checkpoint.store import complete_checkpoints, name_of
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.model.hub import ModelNotHere, model_folder

LATEST, FINAL = "latest", "final"
SETTINGS, CHECKPOINTS = "config.yaml", "checkpoints"
ADAPTER, MODEL = "adapter_config.json", "config.json"

_STEP = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class Source:
    """What is to answer.

    Args:
        name: what it is called, e.g. in the API: the run directory's name, or the model's.
        folder: of an artefact in Hugging Face layout, or of a checkpoint.
        is_checkpoint: which of the two.
        config: of the run that made it; None where that is not beside it.
        notice: one line about a choice that was made for the user, or None.
    """

    name: str
    folder: Path
    is_checkpoint: bool
    config: Config | None
    notice: str | None = None


def find_source(path: str, *, checkpoint: str | None = None) -> Source:
    """
    Args:
        path: a run directory, a folder of its ``checkpoints/``, an artefact's folder, or a model: a folder or hub id.
        checkpoint: of a run directory: the number of its steps, or ``latest``; None: ``final/`` if it is there.

    Raises:
        ConfigError: it is none of these, or the run has no such checkpoint.
    """
    folder = Path(path).expanduser()
    is_run = folder.is_dir() and not _is_artefact(folder) and ((folder / SETTINGS).exists() or _has_result(folder))
    if (folder / MANIFEST).is_file() and _STEP.fullmatch(folder.name):
        source = _checkpoint(folder)
    elif is_run:
        return _of_run(folder, checkpoint)
    elif folder.is_dir() and _is_artefact(folder):
        source = _artefact(folder)
    elif folder.is_dir():
        raise ConfigError(
            f"{path} is neither a run directory, nor a checkpoint, nor a model (it has no {SETTINGS}, {MANIFEST}, "
            f"{ADAPTER} or {MODEL})",
            fix="give the output_dir of a run, a folder of its checkpoints/, or a folder in Hugging Face layout",
        )
    else:
        source = _model(path)
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint: {path} is no run directory", fix="give the output_dir of the run as PATH")
    return source


def _is_artefact(folder: Path) -> bool:
    return (folder / ADAPTER).is_file() or (folder / MODEL).is_file()


def _has_result(run: Path) -> bool:
    return (run / CHECKPOINTS).is_dir() or (run / FINAL).is_dir()


def _of_run(run: Path, checkpoint: str | None) -> Source:
    complete = complete_checkpoints(run / CHECKPOINTS)
    if checkpoint is None and _is_artefact(run / FINAL):
        return _artefact(run / FINAL)
    if not complete:
        missing = "no complete checkpoint" if checkpoint is not None else f"neither {FINAL}/ nor a complete checkpoint"
        raise ConfigError(f"{run} has {missing}", fix="let the run write one, or go on with it: --resume auto")
    if checkpoint in (None, LATEST):
        notice = f"{run} has no {FINAL}/ yet: its newest checkpoint answers, {complete[-1].name}"
        return _checkpoint(complete[-1], notice if checkpoint is None else None)
    if not str(checkpoint).isdecimal():
        raise ConfigError(f"--checkpoint {checkpoint} is no number of steps", fix=f"give a number, or {LATEST}")
    wanted = run / CHECKPOINTS / name_of(int(str(checkpoint)))
    if wanted not in complete:
        there = ", ".join(str(int(path.name.removeprefix("step-"))) for path in complete)
        raise ConfigError(f"{run} has no complete checkpoint of step {checkpoint}", fix=f"there are {there}")
    return _checkpoint(wanted)


def _checkpoint(folder: Path, notice: str | None = None) -> Source:
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"{folder} has no {SETTINGS}", fix="give a checkpoint as training wrote it")
    run = folder.resolve().parents[1].name
    return Source(f"{run}-{folder.name}", folder, True, load_config(folder / SETTINGS), notice)


def _artefact(folder: Path) -> Source:
    run = folder.resolve().parent
    belongs = folder.resolve().name == FINAL and (run / SETTINGS).is_file()
    if not belongs:
        return Source(folder.resolve().name, folder, False, None)
    return Source(run.name, folder, False, load_config(run / SETTINGS))


def _model(path: str) -> Source:
    try:
        folder = model_folder(path, None)
    except ModelNotHere as error:
        raise ConfigError(
            f"{path} is neither a folder nor a model in the local hub cache",
            fix="give the output_dir of a run, or bring the model here by: sft-dist model fetch CONFIG",
        ) from error
    return Source(path, folder, False, None)
