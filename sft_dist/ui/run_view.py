"""What the pages say of runs: a line of the table, and the parts of the page of one. Nothing is read but logs."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft_dist.cluster.logs import Choice, chosen_files, start_of_last_lines
from sft_dist.cluster.status import Status
from sft_dist.cluster.status_view import BLOCKS, in_both, sections
from sft_dist.plan.units import duration
from sft_dist.report.chart import draw
from sft_dist.report.charts import charts_of, score_charts
from sft_dist.report.compare import names_of
from sft_dist.report.model import ReportData
from sft_dist.report.page import STYLES, cards_of, scores_of
from sft_dist.report.redact import redacted_text
from sft_dist.ui.places import Places

LOG_LINES, LOG_BYTES = 100, 1 << 16

# Of a list of ranks: a page has room for so many.
MAX_RANKS = 256

MAX_EVENTS, MAX_SAMPLES = 30, 8

NOT_KNOWN = "-"

# What a terminal draws of letters, in the lines of a status: a bar, a curve.
_PICTURES = re.compile(rf"\s*[━─{BLOCKS}×]+\s+")


@dataclass(frozen=True)
class Row:
    """A run in the table, in the words of ``status``.

    Args:
        path: by which the pages name it. name: as far as it tells it from the others.
        style: of its state. line: the verdict.
    """

    path: str
    name: str
    state: str
    style: str
    line: str
    step: str = NOT_KNOWN
    loss: str = NOT_KNOWN
    left: str = NOT_KNOWN
    sign: str = NOT_KNOWN
    cost: str = NOT_KNOWN


def rows_of(statuses: dict[Path, Status | None], places: Places) -> list[dict[str, Any]]:
    """The runs with the newest sign of life first."""
    names = names_of(list(statuses)) if statuses else []
    found = [(_sign_s(status), name, folder, status) for (folder, status), name in
             zip(statuses.items(), names, strict=True)]  # fmt: skip
    found.sort(key=lambda each: (each[0], each[1]))
    return [asdict(_row(places.name_of(folder), name, status)) for _, name, folder, status in found]


def _sign_s(status: Status | None) -> float:
    """Since the last sign of life; infinite where there was none."""
    if status is None:
        return float("inf")
    pulse, measured = status.found.pulse, status.found.measured
    ages = [each.age_s for each in (pulse, measured) if each is not None]
    return min(ages, default=float("inf"))


def _row(path: str, name: str, status: Status | None) -> Row:
    if status is None:
        return Row(path, name, "reading", "plain", "its files are being read")
    found, verdict, ahead = status.found, status.verdict, status.forecast
    measured, bill = found.measured, found.bill
    of = f" / {found.num_steps:,}" if found.num_steps else ""
    said: dict[str, str] = {}
    if status.step is not None:
        said["step"] = f"{status.step:,}{of}"
    if measured is not None:
        said["loss"] = "not finite" if measured.loss is None else f"{measured.loss:.4f}"
    if ahead is not None and verdict.kind in ("working", "stuck"):
        said["left"] = duration(ahead.left_s)
    if found.pulse is not None:
        said["sign"] = f"{duration(found.pulse.age_s)} ago"
    if bill is not None and bill.spent_usd is not None:
        said["cost"] = in_both(bill.spent_usd, bill.jpy_per_usd)
    return Row(path, name, verdict.kind, style_of(status), redacted_text(verdict.line), **said)


def style_of(status: Status) -> str:
    return "error" if status.verdict.is_trouble else STYLES[status.verdict.kind]


def standing(status: Status) -> dict[str, Any]:
    """What changes with every look: the verdict and a few lines for each thing that is known."""
    known = [(name, [redacted_text(_PICTURES.sub(" to ", line.plain).removeprefix(" to ")) for line in lines])
             for name, lines in sections(status)]  # fmt: skip
    return {
        "kind": status.verdict.kind,
        "style": style_of(status),
        "line": redacted_text(status.verdict.line),
        "facts": known,
        "step": status.step,
        "num_steps": status.found.num_steps,
        "notes": [redacted_text(note) for note in status.notes],
    }


def measured(data: ReportData) -> dict[str, Any]:
    """What changes when the run has measured something: curves, evaluations, events, answers."""
    return {
        "data": data,
        "cards": cards_of(data),
        "charts": [draw(chart) for chart in (*charts_of(data), *score_charts(data.metrics))],
        "scores": scores_of(data),
        "events": data.metrics.events[-MAX_EVENTS:],
        "num_events": len(data.metrics.events),
        "samples": data.samples[:MAX_SAMPLES],
    }


def told(data: ReportData) -> str:
    """Of what was measured, what is worth interrupting somebody for; changes only when such a thing happens."""
    evaluations, events = data.metrics.evaluations, data.metrics.events
    said = []
    if evaluations:
        newest = evaluations[-1]
        loss = newest.scores.get("eval_loss")
        said.append(f"evaluation at step {newest.step:,}" + ("" if loss is None else f": loss {loss:.4f}"))
    if events:
        said.append(f"{events[-1].name.replace('_', ' ')} at step {events[-1].step:,}")
    return ", ".join(said)


@dataclass(frozen=True)
class Log:
    """
    Args:
        ranks: that may be chosen. chosen: one of them, or ``job``.
        text: its last lines, or why there are none.
    """

    ranks: tuple[str, ...]
    chosen: str
    text: str


def read_log(folder: Path, chosen: str, places: Places) -> Log:
    """The last lines that a process of a run has printed.

    Args:
        chosen: a rank, or ``job`` for the output of the SLURM job.

    Raises:
        Refused: the file is not among those that may be named.
    """
    files = {str(rank): path for path, rank in chosen_files(folder, Choice(rank=None)).items()}
    jobs = list(chosen_files(folder, Choice(of_job=True)))
    ranks = (*list(files)[:MAX_RANKS], *(["job"] if jobs else []))
    path = (jobs[0] if jobs else None) if chosen == "job" else files.get(chosen)
    if path is None:
        return Log(ranks, chosen, "")
    places.require(path)
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start_of_last_lines(file, LOG_LINES), end - LOG_BYTES))
            content = file.read(LOG_BYTES)
    except OSError as error:
        return Log(ranks, chosen, f"{path.name} cannot be read: {error.strerror}")
    return Log(ranks, chosen, redacted_text(content.decode("utf-8", "replace")))


def review_command(folder: Path, data: ReportData, argument: str) -> str | None:
    """None: the run has no answers to choose between."""
    has_two = any(len(sample.answers) > 1 for sample in data.samples)
    is_judged = (folder / "eval" / "answers-tuned.jsonl").is_file()
    return f"sft-dist review {argument}" if has_two or is_judged else None
