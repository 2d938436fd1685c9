"""What ``sft-dist eval`` evaluates (a run, checkpoint, model or adapter), and the configuration that builds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.checkpoint.naming import CHECKPOINTS
from sft_dist.checkpoint.source import LATEST, find_newest_source, find_source
from sft_dist.checkpoint.store import name_of
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.load import load_config, read_config
from sft_dist.config.schema import Config, VirtualTokensMethod
from sft_dist.config.validate import validate
from sft_dist.config.validate_eval import has_eval_data
from sft_dist.errors import ConfigError
from sft_dist.export.provenance import read_receipt
from sft_dist.train.adapter_alone import settings_of_adapter

# In place of the training rows of a configuration that is read for its model alone.
NO_ROWS = "(no rows)"


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        config: by which it is built; its ``output_dir`` is where the results go.
        checkpoint: with the trained state; None: the model as it is.
        has_base: whether the state without the checkpoint is the base model.
        adapter: that ``config`` starts from, without its run; None: none.
        has_rows: whether rows are held out; without, it is asked other things.
        trained: the configuration that it was trained by; None: nobody knows it.
    """

    config: Config
    checkpoint: Path | None
    has_base: bool
    adapter: Path | None = None
    has_rows: bool = True
    trained: Config | None = None


def subject_of(
    path: str,
    overrides: Sequence[str],
    *,
    data: Sequence[str],
    checkpoint: str | None,
    out: Path | None,
    base: str | None = None,
    needs_rows: bool = True,
) -> Subject:
    """
    Args:
        path: a run directory, a checkpoint, the folder of a whole model or of a LoRA adapter, or a hub id in the
            local cache.
        overrides: of the run's configuration, or of the least one that a model needs.
        data: files of held-out rows, in place of the run's own, whose long texts are then left out too.
        checkpoint: of a run: the number of its steps, or ``latest``; None: that of which its ``final/`` is.
        out: folder of the results; None: ``eval/`` in the run directory, ``NAME.eval`` beside a model.
        base: model that an adapter without its run is for; None: the one that it names.
        needs_rows: whether there is nothing to ask it without held-out rows.

    Raises:
        ConfigError: it is none of these, nothing is held out, or the configuration cannot be used.
    """
    folder = Path(path).expanduser()
    is_part_of_a_run = (folder / CHECKPOINTS).is_dir() or (folder / "manifest.json").is_file()
    if not is_part_of_a_run:
        return _of_artefact(path, overrides, data, out, base, needs_rows=needs_rows)
    if base is not None:
        raise ConfigError("--base-model is for an adapter without its run; a run knows its base", fix="leave it out")
    chosen = checkpoint
    if chosen is None and (folder / CHECKPOINTS).is_dir():
        chosen = _step_of_final(folder)
    source = find_source(folder, checkpoint=chosen)
    config = load_config(source.folder / "config.yaml", overrides)
    output = out or Path(source.run_directory or source.folder) / "eval"
    has_base = not isinstance(config.method, VirtualTokensMethod)
    has_rows = bool(data) or has_eval_data(config)
    if data and not any(given.startswith(("eval=", "eval.long_texts")) for given in overrides):
        config = _without_long_texts(config, data)
    prepared = _prepared(config, data, output, needs_rows=needs_rows)
    return Subject(prepared, source.folder, has_base=has_base, has_rows=has_rows, trained=config)


def _without_long_texts(config: Config, data: Sequence[str]) -> Config:
    """Those of the run are no part of other rows, unless they are among them."""
    texts = config.eval.long_texts
    paths = [] if texts is None else [path for path in texts.paths if path in data]
    kept = texts.model_copy(update={"paths": paths}) if texts is not None and paths else None
    return config.model_copy(update={"eval": config.eval.model_copy(update={"long_texts": kept})})


def _step_of_final(run: Path) -> str:
    """The checkpoint that ``final/`` was made of, where it is still there; else the newest."""
    step = (read_receipt(run).get("final") or {}).get("step")
    return str(step) if isinstance(step, int) and (run / CHECKPOINTS / name_of(step)).is_dir() else LATEST


def _of_artefact(
    path: str, overrides: Sequence[str], data: Sequence[str], out: Path | None, base: str | None, *, needs_rows: bool
) -> Subject:
    source = find_newest_source(path)
    is_adapter = source.kind == "adapter"
    kind = "an adapter without its run" if is_adapter else "a model"
    if base is not None and not is_adapter:
        raise ConfigError(f"--base-model is for an adapter, and {path} is {kind}", fix="leave it out")
    if not data and needs_rows:
        raise ConfigError(f"{path} is {kind}, and no rows are given to evaluate it on", fix="add --data FILE")
    sections = settings_of_adapter(source.folder, base) if is_adapter else {"model": {"path": path}}
    output = out or Path(f"{source.name.replace('/', '--')}.eval")
    settings: dict[str, Any] = {
        **sections, "output_dir": str(output), "train": {"global_batch_size": 1, "max_steps": 1},
        "data": {**sections.get("data", {}), "train": [{"path": data[0] if data else NO_ROWS}]},
        "logging": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    config = _prepared(read_config(settings, source=path, overrides=overrides), data, output, needs_rows=needs_rows)
    adapter = source.folder if is_adapter else None
    return Subject(config, None, has_base=is_adapter, adapter=adapter, has_rows=bool(data))


def _prepared(config: Config, data: Sequence[str], output: Path, *, needs_rows: bool) -> Config:
    held_out = [SourceConfig(path=path) for path in data] or list(config.data.eval)
    section = config.data
    if held_out:
        # The rows that were trained on need not be here any more; so nothing is said of rows that are on both sides.
        limits = section.audit.max_share.model_copy(update={"leak_exact": 1.0, "leak_near": None})
        audit = section.audit.model_copy(update={"max_share": limits})
        sides = {"train": held_out, "eval": held_out, "eval_split": None}
        section = section.model_copy(update={**sides, "audit": audit})
    # It decides nothing; other scores may be asked for than those that the run was ended by.
    nothing = {"keep_best": False, "final": "last", "best_metric": None, "best_mode": None, "mirror": None}
    checkpoint = config.checkpoint.model_copy(update=nothing)
    updates = {"data": section, "checkpoint": checkpoint, "output_dir": str(output), "early_stopping": None}
    config = config.model_copy(update=updates)
    if not has_eval_data(config) and needs_rows:
        raise ConfigError("data.eval: the run has held out no rows", fix="give some: --data FILE")
    validate(config)
    return config
