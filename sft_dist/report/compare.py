"""Runs side by side: what came of each, and in which settings they differ. Pure, but for ``read_reports``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.config.flat import flat
from sft_dist.errors import ConfigError
from sft_dist.metrics.train_loss import train_loss
from sft_dist.plan.units import HOUR_S
from sft_dist.report.charts import score_name
from sft_dist.report.model import ReportData

# Keys that differ between any two runs and say nothing.
PLACES = ("output_dir",)

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """
    Args:
        name: of the run, its folder's last parts as far as they tell it from the others.
        train_loss: as ``metrics.train_loss`` has it.
        scores: last value of each other score, by its name.
        tokens: that were trained; tokens_per_s: as on the run's own page.
    """

    name: str
    folder: str
    state: str
    step: int | None
    num_steps: int | None
    train_loss: float | None
    best_eval_loss: float | None
    last_eval_loss: float | None
    scores: dict[str, float]
    tokens: int
    tokens_per_s: float | None
    peak_memory_gib: float | None
    hours: float | None
    usd: float | None
    jpy: float | None
    strategy: str | None
    devices: str | None


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        differences: by dotted key, the value of each run as text; None: it has none.
    """

    reports: tuple[ReportData, ...]
    rows: tuple[Row, ...]
    differences: dict[str, tuple[str | None, ...]]


def compare(reports: Sequence[ReportData]) -> Comparison:
    names = names_of([report.folder for report in reports])
    return Comparison(
        tuple(reports), tuple(map(_row, reports, names)), differences([report.settings for report in reports])
    )


def read_reports(folders: Sequence[Path], read: Callable[[Path], ReportData]) -> list[ReportData]:
    """
    Raises:
        ConfigError: there are fewer than two, one is given twice, or holds no run.
    """
    if len(folders) < 2:
        raise ConfigError("one run is compared with none", fix="give two or more folders of runs, or use report")
    places = [folder.resolve() for folder in folders]
    twice = next((folder for folder in places if places.count(folder) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given twice", fix="give each run once")
    return [read(folder) for folder in folders]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as are needed to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _row(report: ReportData, name: str) -> Row:
    metrics, bill, topology = report.metrics, report.bill, report.topology
    evaluated = [value for _, value in metrics.scores("eval_loss") if math.isfinite(value)]
    memory = metrics.finite("peak_memory_gib")
    settings = report.settings or {}
    sharding = settings.get("sharding")
    planned = sharding.get("strategy") if isinstance(sharding, dict) else None
    return Row(
        name=name,
        folder=str(report.folder.resolve()),
        state=report.status.verdict.kind,
        step=report.status.step,
        num_steps=report.status.found.num_steps,
        train_loss=train_loss([value for value in metrics.column("loss") if value is not None]),
        best_eval_loss=min(evaluated, default=None),
        last_eval_loss=evaluated[-1] if evaluated else None,
        scores={
            score_name(key): value
            for key in metrics.score_keys()
            if key != "eval_loss" and math.isfinite(value := metrics.scores(key)[-1][1])
        },
        tokens=report.trained_tokens,
        tokens_per_s=report.tokens_per_s,
        peak_memory_gib=max(memory, default=None),
        hours=None if bill.elapsed_s is None else bill.elapsed_s / HOUR_S,
        usd=bill.usd,
        jpy=bill.jpy(bill.usd),
        strategy=topology.get("strategy") or planned,
        devices=f"{topology.get('processes')} x {topology.get('device')}" if topology else None,
    )


def differences(settings: Sequence[dict[str, Any] | None]) -> dict[str, tuple[str | None, ...]]:
    """Keys whose values are not the same in all runs that have settings; secrets are hidden in them already."""
    texts = [None if each is None else {key: _text(value) for key, value in flat(each)} for each in settings]
    known = [each for each in texts if each is not None]
    keys = dict.fromkeys(key for each in known for key in each)
    found = {}
    for key in keys:
        values = [each.get(key) for each in known]
        if key not in PLACES and any(value != values[0] for value in values):
            found[key] = tuple(None if each is None else each.get(key) for each in texts)
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def comparison_json(comparison: Comparison) -> str:
    """For programs: a row a run, and what differs."""
    names = [row.name for row in comparison.rows]
    document = {
        "format": FORMAT,
        "runs": [asdict(row) for row in comparison.rows],
        "differences": {key: dict(zip(names, values, strict=True)) for key, values in comparison.differences.items()},
    }
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
