"""Runs side by side: what came of each, and in which settings they differ. Pure, but for ``read_reports``."""

from __future__ import annotations

import json
import math
import os
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
        tuple(reports),
        tuple(map(_row, reports, names)),
        differences([report.settings for report in reports], [report.directory for report in reports]),
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


def differences(
    settings: Sequence[dict[str, Any] | None], directories: Sequence[str | None] = ()
) -> dict[str, tuple[str | None, ...]]:
    """Keys whose values are not the same in all runs that have settings; secrets are hidden in them already.

    Args:
        directories: in which each run was started: its relative paths count from there. Empty: paths are but texts.
    """
    given = [None if each is None else dict(flat(each)) for each in settings]
    places = [*directories, *[None] * (len(given) - len(directories))]
    found = {}
    for key in dict.fromkeys(key for each in given if each is not None for key in each):
        if key in PLACES or _is_told_by_parts(key, given):
            continue
        values = [each[key] if each is not None and key in each else None for each in given]
        has = [each is not None and key in each for each in given]
        texts = [_text(value) if there else None for value, there in zip(values, has, strict=True)]
        known = [text for text, each in zip(texts, given, strict=True) if each is not None]
        if any(text != known[0] for text in known) and not (all(has) and _is_one_path(values, places)):
            found[key] = tuple(texts)
    return found


def _is_told_by_parts(key: str, given: Sequence[dict[str, Any] | None]) -> bool:
    """Whether a section is empty where it is one value, and has keys of its own, each of them a line, elsewhere."""
    known = [each for each in given if each is not None]
    is_empty = all(not each[key] and not isinstance(each[key], bool | int) for each in known if key in each)
    return is_empty and any(other.startswith(f"{key}.") for each in known for other in each)


def _is_one_path(values: Sequence[Any], places: Sequence[str | None]) -> bool:
    """Whether the texts name the same file, or the same list of files."""
    if all(isinstance(value, list) for value in values):
        same_length = len({len(value) for value in values}) == 1
        return same_length and all(_is_one_path(each, places) for each in zip(*values, strict=True))
    if not all(isinstance(value, str) and value for value in values):
        return False
    paths = [
        value if place is None else os.path.normpath(Path(place) / value)
        for value, place in zip(values, places, strict=True)
    ]
    return len(set(paths)) == 1


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
