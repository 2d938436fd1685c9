"""The runs of a sweep side by side, also while they run: from their files, and what SLURM says. Imports no torch."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sft_dist.cluster.sweep_files import SweepFile, read_sweeps
from sft_dist.config.load import load_config
from sft_dist.export.provenance import read_receipt
from sft_dist.metrics.logger import METRICS
from sft_dist.metrics.train_loss import LOSS_OF_STEPS, train_loss
from sft_dist.plan.money import format_jpy, format_usd
from sft_dist.train.sessions import earlier_sessions, total_usd

SECONDS_PER_HOUR = 3600

DONE = "done"

# Keys of the data that change neither what the evaluation reads nor how it is cut into tokens.
OF_THE_TRAINING_SET = ("data.train", "data.mix_by", "data.packing", "data.num_workers", "data.cache_dir", "data.audit")


@dataclass(frozen=True)
class SweepRow:
    """How one point of a sweep stands.

    Args:
        state: done; else what SLURM says of its job in lower case, or ``stopped`` or ``not begun`` by its files.
        step, num_steps: optimizer steps that are behind it, and of the whole run; None: not known yet.
        train_loss: as ``metrics.train_loss`` has it.
        best_eval_loss, last_eval_loss: None without an evaluation.
        hours: wall time of all its sessions; usd, jpy: what they cost, where a price is known.
        is_best: whether no other point has a better loss; never where losses cannot be compared.
    """

    point: str
    state: str
    step: int | None
    num_steps: int | None
    train_loss: float | None
    best_eval_loss: float | None
    last_eval_loss: float | None
    hours: float | None
    usd: float | None
    jpy: float | None
    is_best: bool = False


def sweep_rows(folder: Path, *, job_states: Mapping[str, str] | None = None) -> list[SweepRow]:
    """A row for each point of all sweeps that were submitted into a folder, in their order.

    Args:
        job_states: by name of the point, SLURM's word for its job; ``sweep_files.job_states`` asks for them.

    Raises:
        ConfigError: the folder holds no sweep.
    """
    sweeps, states = read_sweeps(folder), job_states or {}
    files = {name: path for sweep in sweeps for name, path in sweep.configs.items()}
    rows = [_row(folder / name, path, states.get(name)) for name, path in files.items()]
    return _mark_best(rows) if why_not_comparable(sweeps) is None else rows


def why_not_comparable(sweeps: Sequence[SweepFile]) -> str | None:
    """Why no point can be called the best by its loss; None where one can."""
    for sweep in sweeps:
        splits = any(load_config(path).data.eval_split is not None for path in sweep.configs.values())
        for key in sweep.keys:
            of_training = key.startswith(OF_THE_TRAINING_SET)
            if key.partition(".")[0] == "model" or (key.partition(".")[0] == "data" and (splits or not of_training)):
                return f"{key} differs, and with it what the loss is taken of: none is called the best"
    return None


def _mark_best(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """By the best evaluation; where none has one, by the training loss."""
    key = "best_eval_loss" if any(row.best_eval_loss is not None for row in rows) else "train_loss"
    known = [loss for row in rows if (loss := getattr(row, key)) is not None]
    if len(known) < 2:
        return list(rows)
    return [SweepRow(**{**asdict(row), "is_best": getattr(row, key) == min(known)}) for row in rows]


def _row(folder: Path, config: Path, job_state: str | None) -> SweepRow:
    lines, receipt = list(_lines(folder / METRICS)), read_receipt(folder)
    sessions = earlier_sessions(folder)
    usd, price = total_usd(sessions), receipt.get("price") or {}
    losses = [math.nan if line["loss"] is None else line["loss"] for line in lines if "loss" in line]
    evaluations = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    planned = (receipt.get("planned") or {}).get("steps")
    return SweepRow(
        point=folder.name,
        state=_state(folder, receipt, job_state),
        step=max((line["step"] for line in lines if "loss" in line), default=None),
        num_steps=planned or load_config(config).train.max_steps,
        train_loss=train_loss(losses),
        best_eval_loss=min(evaluations, default=None),
        last_eval_loss=evaluations[-1] if evaluations else None,
        hours=sum(session.elapsed_s for session in sessions) / SECONDS_PER_HOUR if sessions else None,
        usd=usd,
        jpy=None if usd is None or "jpy_per_usd" not in price else usd * price["jpy_per_usd"],
    )


def _state(folder: Path, receipt: Mapping[str, Any], job_state: str | None) -> str:
    if receipt.get("finished") and (folder / "final").is_dir():
        return DONE
    if job_state is not None:
        return job_state.lower()
    return "stopped" if (folder / METRICS).exists() else "not begun"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Of ``metrics.jsonl``, but for a last one that is being written."""
    if not path.exists():
        return
    for text in path.read_bytes().splitlines(keepends=True):
        if text.endswith(b"\n"):
            yield json.loads(text)


def sweep_table(rows: Sequence[SweepRow], *, title: str, notes: Sequence[str] = ()) -> RenderableType:
    """For a terminal; the best row in bold, with a star.

    Args:
        notes: lines below it, such as ``why_not_comparable``.
    """
    evaluated = any(row.best_eval_loss is not None for row in rows)
    billed = any(row.usd is not None for row in rows)
    said = list(notes)
    if any(row.is_best for row in rows):
        by = "evaluation" if evaluated else "training loss, as there is no evaluation"
        said.append(f"* best {'so far ' if any(row.state != DONE for row in rows) else ''}by {by}")
    if any(row.train_loss is not None for row in rows):
        said.append(f"train loss: mean of the last {LOSS_OF_STEPS} steps")
    lengths = {row.num_steps for row in rows if row.num_steps is not None}
    of_all = f" of {lengths.pop():,}" if len(lengths) == 1 else ""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("point", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in (f"step{of_all}", "train loss", *(("best eval", "last eval") if evaluated else ()), "hours"):
        table.add_column(name, justify="right", no_wrap=True)
    if billed:
        table.add_column("USD", justify="right", no_wrap=True)
        table.add_column("JPY", justify="right", no_wrap=True)
    for row in rows:
        losses = (row.best_eval_loss, row.last_eval_loss) if evaluated else ()
        step = f"{row.step or 0:,}" + (f"/{row.num_steps:,}" if row.num_steps and not of_all else "")
        cells = [f"{row.point} *" if row.is_best else row.point, row.state, step, _loss(row.train_loss)]
        cells += [*map(_loss, losses), "" if row.hours is None else f"{row.hours:.2f}"]
        if billed:
            cells += ["" if row.usd is None else format_usd(row.usd), "" if row.jpy is None else format_jpy(row.jpy)]
        table.add_row(*map(escape, cells), style="bold" if row.is_best else None)
    return Group(table, *map(Text, said))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def to_csv(rows: Sequence[SweepRow]) -> str:
    """One line a point under the names of ``SweepRow``; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(SweepRow.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


def to_json(rows: Sequence[SweepRow]) -> str:
    """The same as a list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=1, ensure_ascii=False) + "\n"
