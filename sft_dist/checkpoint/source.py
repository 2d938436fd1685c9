"""What a path to a result of training means: an artefact, a checkpoint, or a run that has them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, SETTINGS
from sft_dist.checkpoint.naming import CHECKPOINTS, FINAL
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError
from sft_dist.model.hub import ModelNotHere, model_folder

Kind = Literal["adapter", "model", "checkpoint"]

LATEST = "latest"
ADAPTER, MODEL = "adapter_config.json", "config.json"


@dataclass(frozen=True)
class Source:
    """Where trained weights are.

    Args:
        folder: of an artefact in Hugging Face layout, or of a checkpoint.
        run_directory: that it is part of; None where it stands alone.
        config: of the run; None where nobody knows it. A checkpoint has its own.
        name: what it is called, e.g. over HTTP: as the run directory, or as the model.
        notice: one line about a choice that was made for the user, or None.
    """

    kind: Kind
    folder: Path
    run_directory: Path | None
    config: Config | None
    name: str
    notice: str | None = None

    @property
    def label(self) -> str:
        """For the name of what is made of it: ``-step-00000100``, or nothing for a finished artefact."""
        return f"-{self.folder.name}" if self.kind == "checkpoint" else ""


def find_source(path: Path, *, checkpoint: str | None = None) -> Source:
    """
    Args:
        path: a run directory, a checkpoint, or the folder of an adapter or a model.
        checkpoint: of a run directory: the number of its steps, or ``latest``; None: its ``final/``.

    Raises:
        ConfigError: it is none of these, the run is not finished, or it has no such checkpoint.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder here", fix="give a run directory, a checkpoint or an artefact")
    if _is_run(path):
        return _final(path) if checkpoint is None else _checkpoint(_chosen(path, checkpoint))
    if checkpoint is not None:
        raise _is_no_run(str(path))
    if (path / MANIFEST).is_file():
        if path.suffix in store.SUFFIXES:
            raise ConfigError(
                f"{path} is no checkpoint to use: {path.suffix.removeprefix('.')} is what became of it",
                fix=f"give another one of {path.parent}",
            )
        return _checkpoint(path)
    kind = _kind_of(path)
    if kind is None:
        raise ConfigError(
            f"{path} is neither a run directory, nor a checkpoint, nor a model (it has no {SETTINGS}, {MANIFEST}, "
            f"{ADAPTER} or {MODEL})",
            fix="give the output_dir of a run, a folder of its checkpoints/, or a folder in Hugging Face layout",
        )
    return _artefact(path, kind)


def find_newest_source(path: str, *, checkpoint: str | None = None) -> Source:
    """As ``find_source``; a run that is not finished is its newest checkpoint, and a notice says so.

    Args:
        path: also the hub id of a model in the local hub cache.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        model = _of_hub(path)
        if checkpoint is not None:
            raise _is_no_run(path)
        return model
    if checkpoint is not None or not _is_run(folder) or _kind_of(folder / FINAL) is not None:
        return find_source(folder, checkpoint=checkpoint)
    newest = _complete(folder, f"neither {FINAL}/ nor a complete checkpoint")[-1]
    return _checkpoint(newest, notice=f"{folder} has no {FINAL}/ yet: its newest checkpoint answers, {newest.name}")


def _kind_of(folder: Path) -> Literal["adapter", "model"] | None:
    """Of an artefact; None: it is none."""
    if (folder / ADAPTER).is_file():
        return "adapter"
    return "model" if (folder / MODEL).is_file() else None


def _is_run(folder: Path) -> bool:
    if (folder / MANIFEST).is_file() or _kind_of(folder) is not None:
        return False
    return (folder / SETTINGS).is_file() or (folder / CHECKPOINTS).is_dir() or (folder / FINAL).is_dir()


def _final(run: Path) -> Source:
    kind = _kind_of(run / FINAL)
    if kind is None:
        has_checkpoints = bool(store.complete_checkpoints(run / CHECKPOINTS))
        raise ConfigError(
            f"{run} has no {FINAL}/: the run is not finished",
            fix=f"say --checkpoint {LATEST}" if has_checkpoints else "train it to the end, or to its first checkpoint",
        )
    return _artefact(run / FINAL, kind)


def _artefact(folder: Path, kind: Kind) -> Source:
    # Only final/ is what the run beside it made.
    run = folder.resolve().parent
    if folder.resolve().name == FINAL and (run / SETTINGS).is_file():
        return Source(kind, folder, run, load_config(run / SETTINGS), run.name)
    return Source(kind, folder, None, None, folder.resolve().name)


def _checkpoint(folder: Path, notice: str | None = None) -> Source:
    if not (folder / SETTINGS).is_file():
        raise ConfigError(f"{folder} has no {SETTINGS}", fix="give a checkpoint as training wrote it")
    around = folder.resolve().parent
    run = around.parent if around.name == CHECKPOINTS else None
    name = folder.resolve().name if run is None else f"{run.name}-{folder.resolve().name}"
    return Source("checkpoint", folder, run, load_config(folder / SETTINGS), name, notice)


def _complete(run: Path, missing: str) -> list[Path]:
    """Checkpoints of a run, the oldest first, at least one."""
    complete = store.complete_checkpoints(run / CHECKPOINTS)
    if not complete:
        raise ConfigError(f"{run} has {missing}", fix="let the run write one, or go on with it: --resume auto")
    return complete


def _chosen(run: Path, wanted: str) -> Path:
    complete = _complete(run, "no complete checkpoint")
    if wanted == LATEST:
        return complete[-1]
    if not wanted.isdecimal():
        raise ConfigError(f"--checkpoint {wanted} is no number of steps", fix=f"give a number, or {LATEST}")
    by_step = {store.step_of(path.name): path for path in complete}
    if int(wanted) not in by_step:
        there = ", ".join(str(step) for step in by_step)
        raise ConfigError(f"{run} has no complete checkpoint of step {wanted}", fix=f"there are {there}, and {LATEST}")
    return by_step[int(wanted)]


def _of_hub(path: str) -> Source:
    try:
        folder = model_folder(path, None)
    except ModelNotHere as error:
        raise ConfigError(
            f"{path} is neither a folder nor a model in the local hub cache",
            fix="give the output_dir of a run, or bring the model here by: sft-dist model fetch CONFIG",
        ) from error
    return Source("model", folder, None, None, path)


def _is_no_run(path: str) -> ConfigError:
    return ConfigError(
        f"--checkpoint chooses one of a run directory, and {path} is none",
        fix="give the output_dir of the run, or leave --checkpoint out",
    )
