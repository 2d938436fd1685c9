"""What can be found wrong before anything expensive is imported, started or loaded. Imports no torch."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sft_dist.config.schema import Config
from sft_dist.data.sources import find_files
from sft_dist.errors import ConfigError

# Any of these means that a run has trained here.
MARKS_OF_A_RUN = ("config.yaml", "metrics.jsonl", "checkpoints", "final")


def preflight(config: Config) -> None:
    """Looks at the files that a run reads, and at the folder that it writes.

    Raises:
        ConfigError: the run directory is used or cannot be written; the model's folder or the template is not there.
        DataError: a source is not there.
    """
    check_run_directory(Path(config.output_dir))
    model = config.model.path
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ConfigError(f"model.path: the folder {model} does not exist", fix="give an existing folder or a hub id")
    if config.model.revision is not None and Path(model).is_dir():
        raise ConfigError(
            f"model.revision is {config.model.revision}, which has no effect: model.path {model} is a folder",
            fix="remove model.revision, or give a hub id as model.path",
        )
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        raise ConfigError(
            f"data.chat_template: the file {template} does not exist",
            fix="give the path of a Jinja file; docs/data.md has one to start from",
        )
    for source in (*config.data.train, *config.data.eval):
        find_files(source.path)


def check_run_directory(folder: Path) -> None:
    """Makes the folder, and proves that it can be written and holds no other run.

    Raises:
        ConfigError: it is used, or cannot be written.
    """
    used = next((name for name in MARKS_OF_A_RUN if (folder / name).exists()), None)
    if used:
        raise ConfigError(
            f"output_dir: {folder} already holds a run (it has {used})",
            fix="set another output_dir, or move that folder away",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise ConfigError(
            f"output_dir: {folder} cannot be written ({e.strerror or e})",
            fix="set output_dir to a folder you may write",
        ) from e
