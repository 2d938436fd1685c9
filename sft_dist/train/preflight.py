"""What can be found wrong before anything expensive is imported, started or loaded. Imports no torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.deepspeed import load_knobs
from sft_dist.config.measured import files_of_evaluations
from sft_dist.config.schema import Config, LoraMethod, Zero1Sharding, Zero2Sharding, Zero3Sharding
from sft_dist.data.jinja_template import JinjaTemplate
from sft_dist.data.named_templates import read_template
from sft_dist.data.sources import check_source
from sft_dist.errors import ConfigError
from sft_dist.train import from_mirror, run_lock
from sft_dist.train.asked import NEVER
from sft_dist.train.resume import MARKS_OF_A_RUN, find_checkpoints, holds_a_run
from sft_dist.train.run_files import writing_into


def preflight(config: Config, *, resume: str = NEVER) -> None:
    """Looks at the files that a run reads, and at the folder that it writes.

    Args:
        resume: ``never``, ``auto`` or the path of a checkpoint, as for ``train --resume``.

    Raises:
        ConfigError: the run directory or the mirror is used or cannot be written; the model's folder, the template,
            the adapter or the checkpoint to go on from is not there; the DeepSpeed file is wrong.
        CheckpointError: the mirror does not answer.
        DataError: a source is not there, where the hub is not asked for a dataset; the template is not Jinja.
    """
    if is_first_to_look():
        with writing_into(Path(config.output_dir)):
            run_lock.look(Path(config.output_dir))
    check_run_directory(Path(config.output_dir), may_hold_a_run=resume != NEVER)
    if not from_mirror.may_fetch(config, resume):
        find_checkpoints(resume, config.output_dir)
    # Not every rank has to ask the storage.
    if from_mirror.needs_storage(config, resume) and is_first_to_look():
        from_mirror.check_mirror(config, resume)
    check_inputs(config)


def check_inputs(config: Config, *, with_rows: bool = True) -> None:
    """Looks at the files that a run reads.

    Args:
        with_rows: those of training and held-out rows too.

    Raises:
        ConfigError, DataError: as ``preflight``.
    """
    model = config.model.path
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise ConfigError(f"model.path: the folder {model} does not exist", fix="give an existing folder or a hub id")
    if config.model.revision is not None and Path(model).is_dir():
        raise ConfigError(
            f"model.revision is {config.model.revision}, which has no effect: model.path {model} is a folder",
            fix="remove model.revision, or give a hub id as model.path",
        )
    if isinstance(config.sharding, Zero1Sharding | Zero2Sharding | Zero3Sharding):
        load_knobs(config.sharding.deepspeed_config, int(config.sharding.strategy.removeprefix("zero")))
    if config.data.chat_template is not None:
        template = read_template(config.data.chat_template)
        JinjaTemplate(template.source, name=template.name, variables={})
    adapter = config.method.init_from if isinstance(config.method, LoraMethod) else None
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(
            f"method.init_from: {adapter} "
            + ("has no adapter_config.json" if Path(adapter).is_dir() else "is no folder here"),
            fix="give the folder of an adapter in PEFT's format, e.g. the final/ of an earlier run",
        )
    texts = config.eval.long_texts
    long_texts = [] if texts is None else [SourceConfig(path=path, format="text") for path in texts.paths]
    for source in (*config.data.train, *config.data.eval, *long_texts) if with_rows else ():
        check_source(source)
    for key, file in files_of_evaluations(config.eval):
        if not Path(file).is_file():
            raise ConfigError(f"{key}: {file} is no file here", fix="correct the path, from where the run is started")


def is_first_to_look() -> bool:
    """Whether this process is no rank of a launch: those come later, and leave to rank 0 what only one has to do."""
    return "RANK" not in os.environ


def take_run_directory(folder: Path, *, may_hold_a_run: bool, say: Callable[[str], None]) -> None:
    """Makes the folder this run's own, until the process ends; then as ``check_run_directory``.

    Args:
        say: told if another process has to end first, or if nothing can be locked there.

    Raises:
        ConfigError: it is used, or cannot be written.
    """
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        run_lock.hold(folder, say=say)
    check_run_directory(folder, may_hold_a_run=may_hold_a_run)


def check_holds_no_run(folder: Path) -> None:
    """Writes nothing.

    Raises:
        ConfigError: a run has begun in the folder.
    """
    if holds_a_run(folder):
        marks = [name for name in MARKS_OF_A_RUN if (folder / name).exists()]
        raise ConfigError(
            f"output_dir: {folder} already holds a run (it has {marks[0]})",
            fix="go on with it by --resume auto, or set another output_dir",
        )


def check_run_directory(folder: Path, *, may_hold_a_run: bool) -> None:
    """Makes the folder, and proves that it can be written and holds no other run.

    Raises:
        ConfigError: it is used, or cannot be written.
    """
    if not may_hold_a_run:
        check_holds_no_run(folder)
    with writing_into(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
