"""``sft-dist eval``: how good a run or a model is on held-out rows, and how much better than its base.

The model is built, sharded and filled as for training, so what fits for training fits here, on any number of processes
and under any strategy. The base is the state before the first step; the trained state comes out of a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.naming import CHECKPOINTS
from sft_dist.checkpoint.restore import restore
from sft_dist.checkpoint.source import LATEST, find_newest_source, find_source
from sft_dist.checkpoint.store import name_of
from sft_dist.config.data_schema import SourceConfig
from sft_dist.config.load import load_config, read_config
from sft_dist.config.schema import Config, VirtualTokensMethod
from sft_dist.config.validate import validate
from sft_dist.config.validate_eval import has_eval_data
from sft_dist.errors import ConfigError
from sft_dist.export.provenance import read_receipt
from sft_dist.runtime.process_group import process_group, run_on_main_first
from sft_dist.scores.answered import Answered
from sft_dist.scores.compare import Compared, compare
from sft_dist.sharding import registry
from sft_dist.sharding.verify import verify_sharding
from sft_dist.train.evaluations import Evaluated, evaluations_of
from sft_dist.train.ready import make_ready
from sft_dist.train.resume import NEVER
from sft_dist.train.run_files import writing_into

BASE, TUNED = "base", "tuned"

# In the folder of the results.
RESULT = "eval.json"


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Args:
        config: by which it is built; its ``output_dir`` is where the results go.
        checkpoint: with the trained state; None: the model as it is.
        has_base: whether the state without the checkpoint is the base model.
    """

    config: Config
    checkpoint: Path | None
    has_base: bool


def subject_of(
    path: str, overrides: Sequence[str], *, data: Sequence[str], checkpoint: str | None, out: Path | None
) -> Subject:
    """
    Args:
        path: a run directory, a checkpoint, the folder of a whole model, or a hub id in the local cache.
        overrides: of the run's configuration, or of the least one that a model needs.
        data: files of held-out rows, in place of the run's own.
        checkpoint: of a run: the number of its steps, or ``latest``; None: that of which its ``final/`` is.
        out: folder of the results; None: ``eval/`` in the run directory, ``NAME.eval`` beside a model.

    Raises:
        ConfigError: it is none of these, nothing is held out, or the configuration cannot be used.
    """
    folder = Path(path).expanduser()
    is_part_of_a_run = (folder / CHECKPOINTS).is_dir() or (folder / "manifest.json").is_file()
    if not is_part_of_a_run:
        return Subject(_of_model(path, overrides, data, out), None, has_base=False)
    chosen = checkpoint
    if chosen is None and (folder / CHECKPOINTS).is_dir():
        chosen = _step_of_final(folder)
    source = find_source(folder, checkpoint=chosen)
    config = load_config(source.folder / "config.yaml", overrides)
    output = out or Path(source.run_directory or source.folder) / "eval"
    base = not isinstance(config.method, VirtualTokensMethod)
    return Subject(_prepared(config, data, output), source.folder, has_base=base)


def _step_of_final(run: Path) -> str:
    """The checkpoint that ``final/`` was made of, where it is still there; else the newest."""
    step = (read_receipt(run).get("final") or {}).get("step")
    return str(step) if isinstance(step, int) and (run / CHECKPOINTS / name_of(step)).is_dir() else LATEST


def _of_model(path: str, overrides: Sequence[str], data: Sequence[str], out: Path | None) -> Config:
    source = find_newest_source(path)
    if source.kind != "model":
        raise ConfigError(
            f"{path} is an adapter without its run", fix="give the run, or merge it: sft-dist export PATH --merge"
        )
    if not data:
        raise ConfigError(f"{path} is a model, and no rows are given to evaluate it on", fix="add --data FILE")
    output = out or Path(f"{source.name.replace('/', '--')}.eval")
    settings: dict[str, Any] = {
        "model": {"path": path}, "data": {"train": [{"path": data[0]}]}, "output_dir": str(output),
        "train": {"global_batch_size": 1, "max_steps": 1}, "logging": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    return _prepared(read_config(settings, source=path, overrides=overrides), data, output)


def _prepared(config: Config, data: Sequence[str], output: Path) -> Config:
    held_out = [SourceConfig(path=path) for path in data] or list(config.data.eval)
    section = config.data
    if held_out:
        # The rows that were trained on need not be here any more; so nothing is said of rows that are on both sides.
        limits = section.audit.max_share.model_copy(update={"leak_exact": 1.0, "leak_near": None})
        audit = section.audit.model_copy(update={"max_share": limits})
        sides = {"train": held_out, "eval": held_out, "eval_split": None}
        section = section.model_copy(update={**sides, "audit": audit})
    checkpoint = config.checkpoint.model_copy(update={"mirror": None, "keep_best": False, "final": "last"})
    updates = {"data": section, "checkpoint": checkpoint, "output_dir": str(output), "early_stopping": None}
    config = config.model_copy(update=updates)
    if not has_eval_data(config):
        raise ConfigError("data.eval: the run has held out no rows", fix="give some: --data FILE")
    validate(config)
    return config


def evaluate_subject(subject: Subject, *, with_base: bool) -> None:
    """Evaluates, shows and writes; every rank of a launch must call it.

    Args:
        with_base: the base, too, where there is one.

    Raises:
        SftError: as ``run_training``.
    """
    ready = make_ready(subject.config, resume=NEVER)
    run, process = ready.run, ready.process
    console = Console(highlight=False, quiet=not process.world.is_main)
    folder, found = Path(run.output_dir), dict[str, Evaluated]()
    with process_group(process.world, process.device, ready.store):
        strategy = registry.apply(run, process.device)
        verify_sharding(strategy, registry.describe(run, process.world.rank))
        evaluations = evaluations_of(run, ready.config, process, ready.inputs, say=console.print)
        assert evaluations is not None, "there are held-out rows"
        if subject.checkpoint is None or (with_base and subject.has_base):
            console.print(f"evaluating {run.model.path}", markup=False, soft_wrap=True)
            found[BASE] = evaluations.evaluate(strategy, 0, is_end=True)
        if subject.checkpoint is not None:
            console.print(f"evaluating {subject.checkpoint}", markup=False, soft_wrap=True)
            restore(subject.checkpoint, strategy, group=dist.new_group(backend="gloo"))
            step = Manifest.read(subject.checkpoint).completed_steps
            found[TUNED] = evaluations.evaluate(strategy, step, is_end=True)

        def write() -> None:
            compared = _compared(found, ready.config)
            with writing_into(folder):
                _write(folder, subject, found, compared)
            _show(console, found, compared)
            console.print(f"results in {folder / RESULT}", markup=False, soft_wrap=True)

        run_on_main_first(process.world, process.store, "eval", write)
        dist.barrier()
    strategy.close()


def _compared(found: dict[str, Evaluated], config: Config) -> dict[str, Compared]:
    """Scores of the base and of what became of it, with their intervals."""
    scores = config.eval.scores
    if scores is None or len(found) < 2:
        return {}
    return compare(_answered(found[BASE]), _answered(found[TUNED]), scores, seed=config.train.seed)


def _answered(evaluated: Evaluated) -> list[Answered]:
    assert evaluated.findings is not None
    return [Answered(r.prompt, r.answer, r.reference or "", r.source) for r in evaluated.findings.judged]


def _write(folder: Path, subject: Subject, found: dict[str, Evaluated], compared: dict[str, Compared]) -> None:
    signature = {
        name: value
        for each in found.values()
        if each.findings is not None and each.findings.scores is not None
        for name, value in each.findings.scores.signature.items()
    }
    document = {
        "model": subject.config.model.path,
        "checkpoint": None if subject.checkpoint is None else str(subject.checkpoint),
        "metrics": {name: each.metrics for name, each in found.items()},
        "compared": {name: asdict(each) for name, each in compared.items()},
        "signature": signature,
    }
    (folder / RESULT).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, each in found.items():
        findings = each.findings
        replies = () if findings is None else (*findings.samples, *findings.judged)
        if replies:
            lines = (json.dumps(asdict(reply), ensure_ascii=False) + "\n" for reply in replies)
            (folder / f"answers-{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _show(console: Console, found: dict[str, Evaluated], compared: dict[str, Compared]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    if compared:
        table.add_column("difference, 95 % interval", justify="right")
        table.add_column("better in", justify="right")
    keys = dict.fromkeys(key for each in found.values() for key in each.metrics)
    for key in keys:
        cells = [f"{each.metrics[key]:,.4f}" if key in each.metrics else "" for each in found.values()]
        one = compared.get(key.removeprefix("eval_scores/"))
        if one is not None:
            low, high = one.difference_interval
            cells += [f"{one.difference:+,.4f}  ({low:+,.4f} to {high:+,.4f})", f"{one.tuned_better:.0%}"]
        table.add_row(key.removeprefix("eval_").removeprefix("scores/"), *cells)
    console.print(table)
    for name, each in found.items():
        for note in () if each.findings is None else each.findings.notes:
            console.print(f"{name}: {note}", markup=False, soft_wrap=True)
