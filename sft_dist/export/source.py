"""What ``sft-dist export PATH`` takes: the artefact or the checkpoint that a path means. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError

Kind = Literal["adapter", "model", "checkpoint"]

LATEST = "latest"


@dataclass(frozen=True)
class Source:
    """Where the trained weights are.

    Args:
        folder: of the artefact or the checkpoint.
        run_directory: that it is part of; None where it stands alone.
        config: of the run; None where nobody knows it. A checkpoint has its own.
    """

    kind: Kind
    folder: Path
    run_directory: Path | None
    config: Config | None

    @property
    def label(self) -> str:
        """For the name of what is made of it: ``-step-00000100``, or nothing for a finished artefact."""
        return f"-{self.folder.name}" if self.kind == "checkpoint" else ""


def find_source(path: Path, *, checkpoint: str | None = None) -> Source:
    """
    Args:
        path: a run directory, a checkpoint, or an artefact.
        checkpoint: of a run directory, its step or ``latest``; None: its ``final/``.

    Raises:
        ConfigError: there is none of these.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder here", fix="give a run directory, a checkpoint or an artefact")
    is_run = (path / "config.yaml").is_file() and not (path / MANIFEST).is_file()
    if checkpoint is not None:
        if not is_run:
            raise ConfigError(
                f"--checkpoint chooses one of a run directory, and {path} is none",
                fix="give the run directory, or leave --checkpoint out",
            )
        return _checkpoint(_chosen(path, checkpoint))
    if (path / MANIFEST).is_file():
        return _checkpoint(path)
    if _kind_of(path) is not None:
        return _artefact(path)
    if is_run:
        if not (path / "final").is_dir():
            raise ConfigError(
                f"{path} has no final/: the run is not finished",
                fix=f"say --checkpoint {LATEST}" if _steps(path) else "train it to the end, or to its first checkpoint",
            )
        return _artefact(path / "final")
    raise ConfigError(
        f"{path} is no run directory, no checkpoint, no adapter and no model",
        fix="give a folder with config.yaml, manifest.json, adapter_config.json or config.json",
    )


def _kind_of(folder: Path) -> Literal["adapter", "model"] | None:
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    return "model" if (folder / "config.json").is_file() else None


def _artefact(folder: Path) -> Source:
    kind = _kind_of(folder)
    if kind is None:
        raise ConfigError(
            f"{folder} is no artefact: it has neither adapter_config.json nor config.json",
            fix=f"say --checkpoint {LATEST}, or give the folder of an adapter or a model",
        )
    # Only final/ is what the run beside it made.
    around = folder.resolve().parent
    is_final = folder.resolve().name == "final" and (around / "config.yaml").is_file()
    config = load_config(around / "config.yaml") if is_final else None
    return Source(kind, folder, around if is_final else None, config)


def _checkpoint(folder: Path) -> Source:
    around = folder.resolve().parent
    run_directory = around.parent if around.name == "checkpoints" else None
    return Source("checkpoint", folder, run_directory, load_config(folder / "config.yaml"))


def _steps(run_directory: Path) -> list[Path]:
    return store.complete_checkpoints(run_directory / "checkpoints")


def _chosen(run_directory: Path, wanted: str) -> Path:
    there = _steps(run_directory)
    names = ", ".join(str(int(path.name.removeprefix("step-"))) for path in there) or "none"
    if wanted == LATEST and there:
        return there[-1]
    if wanted.isdecimal():
        for path in there:
            if path.name == store.name_of(int(wanted)):
                return path
    raise ConfigError(
        f"--checkpoint {wanted}: {run_directory} has no such checkpoint",
        fix=f"say {LATEST} or a step; there are: {names}",
    )
