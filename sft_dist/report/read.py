"""From a run directory, of whatever moment, to what a report says of it. Nothing is written, no process is asked."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from sft_dist.checkpoint.naming import CHECKPOINTS, complete_checkpoints, step_of
from sft_dist.cluster.file_clock import Clock
from sft_dist.cluster.job_of_run import Ask
from sft_dist.cluster.status import Status, read_status
from sft_dist.config.control_schema import EVAL_LOSS
from sft_dist.config.text import read_yaml
from sft_dist.data.audit.findings import Audit
from sft_dist.errors import ConfigError, DataError
from sft_dist.export.provenance import read_receipt
from sft_dist.report.metrics import Metrics, read_metrics
from sft_dist.report.model import Bill, Compared, DataSource, Found, ReportData
from sft_dist.report.redact import redacted, redacted_text
from sft_dist.report.samples import read_samples
from sft_dist.train.run_files import AUDIT, CONFIG
from sft_dist.train.sessions import earlier_sessions
from sft_dist.train.waste import Waste

GIB = 2**30

_WASTE = TypeAdapter(Waste)


def ask_nobody(_: str) -> None:
    """For the job of a run that reports of itself.

    Raises:
        ConfigError: always: its own files say all that is to be said.
    """
    raise ConfigError("SLURM was not asked", fix="sft-dist status asks it")


def read_report(folder: Path, *, clock: Clock | None = None, ask: Ask | None = None) -> ReportData:
    """
    Args:
        clock: the moment it is; None: that of the file system.
        ask: for the state of the run's job; None: SLURM.

    Raises:
        ConfigError: the folder holds no run, and none was submitted into it.
    """
    status = read_status(folder, clock=clock) if ask is None else read_status(folder, clock=clock, ask=ask)
    notes = [redacted_text(note) for note in status.notes]
    metrics, receipt = read_metrics(folder), read_receipt(folder)
    if metrics.unread:
        notes.append(f"lines of metrics.jsonl that cannot be read: {metrics.unread}")
    notes += _broken_evaluations(metrics)
    settings = _settings(folder, notes)
    bill = _bill(folder, receipt, status)
    sources, findings = _data(folder, settings, notes)
    return ReportData(
        folder=folder,
        status=status,
        metrics=metrics,
        tokens_per_s=tokens_per_s(receipt, metrics),
        checkpoints=tuple(step_of(path.name) or 0 for path in complete_checkpoints(folder / CHECKPOINTS)),
        compared=_compared(receipt, status, metrics, bill),
        sources=sources,
        findings=findings,
        samples=read_samples(folder, notes),
        bill=bill,
        versions=_mapping(receipt.get("versions")),
        topology=_mapping(receipt.get("topology")),
        identity=redacted(_mapping(receipt.get("identity"))),
        settings=settings,
        directory=receipt.get("directory"),
        notes=tuple(notes),
    )


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _settings(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    path = folder / CONFIG
    try:
        settings = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{CONFIG} cannot be read: {str(error).splitlines()[0]}")
        return None
    return redacted(settings) if isinstance(settings, dict) else None


def _bill(folder: Path, receipt: dict[str, Any], status: Status) -> Bill:
    found = status.found.bill
    price = _mapping(receipt.get("price"))
    try:
        waste = None if receipt.get("waste") is None else _WASTE.validate_python(receipt["waste"])
    except ValidationError:
        waste = None
    return Bill(
        sessions=earlier_sessions(folder),
        elapsed_s=None if found is None else found.elapsed_s,
        usd=None if found is None else found.spent_usd,
        usd_per_hour=_number(price.get("usd")),
        jpy_per_usd=_number(price.get("jpy_per_usd")),
        price_name=price.get("name"),
        waste=waste,
    )


def _compared(receipt: dict[str, Any], status: Status, metrics: Metrics, bill: Bill) -> tuple[Compared, ...]:
    """Plan and run side by side; figures that neither of the two has are left out."""
    planned, actual = _mapping(receipt.get("planned")), _mapping(receipt.get("actual"))
    plan, is_finished = status.found.planned, status.found.finished
    total_s = _number(planned.get("total_s")) or (None if plan is None else plan.total_s)
    usd = None if plan is None else plan.usd
    if usd is None and total_s is not None and bill.usd_per_hour is not None:
        usd = total_s * bill.usd_per_hour / 3600
    ahead = None if is_finished else status.forecast
    step_s = _number(actual.get("step_s")) or _median(metrics, "step_time_s")
    on_gpu = _mapping(receipt.get("topology")).get("device", "cpu") != "cpu"
    memory = _number(actual.get("peak_allocated_bytes"))
    if memory is None and on_gpu and metrics.finite("peak_memory_gib"):
        memory = max(metrics.finite("peak_memory_gib")) * GIB
    took_s = bill.elapsed_s if ahead is None else ahead.total_s
    paid = bill.usd if ahead is None else ahead.total_usd
    rows = (
        Compared("Step", "seconds", _number(planned.get("step_s")) or (None if plan is None else plan.step_s), step_s),
        Compared("Tokens a second", "rate", _number(planned.get("tokens_per_s")),
                 tokens_per_s(receipt, metrics)),
        Compared("Peak memory of a GPU", "bytes", _number(planned.get("peak_allocated_bytes")) if on_gpu else None,
                 memory),
        Compared("Steps", "count", _number(planned.get("steps")), len(metrics.steps) or None),
        Compared("Tokens", "count", _number(planned.get("tokens")), sum(metrics.finite("num_tokens")) or None),
        Compared("Time", "duration", total_s, took_s, is_forecast=ahead is not None),
        Compared("USD", "usd", usd, paid, is_forecast=ahead is not None),
        Compared("JPY", "jpy", bill.jpy(usd), bill.jpy(paid), is_forecast=ahead is not None),
        Compared("A checkpoint", "bytes", _number(planned.get("checkpoint_bytes")),
                 _number(actual.get("checkpoint_bytes"))),
        Compared("final/", "bytes", _number(planned.get("final_bytes")), _number(actual.get("final_bytes"))),
    )  # fmt: skip
    return tuple(row for row in rows if row.planned is not None or row.actual is not None)


def tokens_per_s(receipt: dict[str, Any], metrics: Metrics) -> float | None:
    """Mean of the steady steps, the one speed of a run on all pages: as its receipt has it, else of its metrics."""
    return _number(_mapping(receipt.get("actual")).get("tokens_per_s")) or metrics.tokens_per_s


def _broken_evaluations(metrics: Metrics) -> list[str]:
    """A warning where a held-out loss is no number."""
    found = [
        each.step
        for each in metrics.evaluations
        if any(key.startswith(EVAL_LOSS) and not math.isfinite(value) for key, value in each.scores.items())
    ]
    if not found:
        return []
    last = f", the last one that of step {found[-1]:,}" if len(found) > 1 else f", that of step {found[0]:,}"
    count = f"{len(found)} of {len(metrics.evaluations)} evaluations"
    return [f"the loss on held-out rows is not finite in {count}{last}; none of them counts as an improvement"]


def _median(metrics: Metrics, column: str) -> float | None:
    """Of all steps but the first ones, where there are others."""
    values = metrics.steady(column)
    return statistics.median(values) if values else None


def _data(
    folder: Path, settings: dict[str, Any] | None, notes: list[str]
) -> tuple[tuple[DataSource, ...], tuple[Found, ...] | None]:
    """What the audit counted and found; without one, the names that the configuration has."""
    path = folder / AUDIT
    if path.exists():
        try:
            audit = Audit.read(path)
        except DataError as error:
            notes.append(f"{AUDIT}: {error.what.splitlines()[0]}")
        else:
            sources = tuple(
                DataSource(figures.set, each.source, each.rows, each.tokens, each.supervised_tokens)
                for figures in audit.figures
                for each in figures.sources
            )
            return sources, tuple(
                Found(each.severity, each.place, each.check, each.what, each.count, each.share)
                for each in audit.findings
            )
    data = _mapping((settings or {}).get("data"))
    named = [
        DataSource(side, str(each.get("name") or each.get("path")), None, None, None)
        for side in ("train", "eval")
        for each in data.get(side) or []
        if isinstance(each, dict)
    ]
    return tuple(named), None
