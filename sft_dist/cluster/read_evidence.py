"""Reads what the files of a run directory say of a run. Imports no torch.

A file that is not there is None, and one that cannot be understood is a note: nothing is guessed.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import MANIFEST, Manifest
from sft_dist.checkpoint.naming import CHECKPOINTS, FINAL
from sft_dist.cluster.evidence import Bill, Evidence, Measured, Planned, Pulse, Saved
from sft_dist.cluster.file_clock import Clock
from sft_dist.cluster.happened import happened
from sft_dist.config.text import read_yaml
from sft_dist.errors import SftError
from sft_dist.export.provenance import RECEIPT, read_receipt
from sft_dist.metrics.heartbeat import HEARTBEAT, Beat
from sft_dist.metrics.logger import METRICS
from sft_dist.plan.to_json import PLAN, load_plan
from sft_dist.train.resume import holds_a_run
from sft_dist.train.sessions import Session, earlier_sessions, total_usd

# Points of the curve of losses: what a terminal has room for.
CURVE_POINTS = 40


def read_evidence(folder: Path, clock: Clock) -> Evidence:
    """Reads a run directory."""
    notes: list[str] = []
    pulse = _pulse(folder, clock, notes)
    lines = _lines(folder)
    measured = _measured(folder, clock, lines)
    receipt = read_receipt(folder)
    if not receipt and measured is not None:
        notes.append(f"no {RECEIPT} that can be read: the bill is what {METRICS} has of it")
    planned = _planned(folder, notes)
    final, finished = _final(folder, receipt)
    return Evidence(
        pulse=pulse,
        measured=measured,
        bill=_bill(folder, receipt, pulse),
        planned=planned,
        saved=_saved(folder / CHECKPOINTS, clock, notes),
        finished=finished,
        final=final,
        num_steps=_num_steps(pulse, receipt),
        notes=tuple(notes),
        stopped_at=_stopped_at(receipt),
        happened=happened(folder, lines),
    )


def _pulse(folder: Path, clock: Clock, notes: list[str]) -> Pulse | None:
    try:
        beat = Beat.read(folder)
        if beat is None:
            if holds_a_run(folder):
                notes.append(f"no {HEARTBEAT}: what the run is doing at the moment is not known")
            return None
        dated = (folder / HEARTBEAT).stat().st_mtime
    except (OSError, ValueError) as error:
        notes.append(f"{HEARTBEAT} cannot be read: {error}")
        return None
    age_s, written = clock.age_s(dated), _seconds(beat.written_at)
    # By the clock of the node that wrote both times, so that no other clock is needed for what lies between them.
    in_phase = written - _seconds(beat.phase_since)
    without_step = None
    if beat.phase == "training":
        without_step = in_phase if beat.step_at is None else min(in_phase, written - _seconds(beat.step_at))
    return Pulse(beat, dated, age_s, None if without_step is None else age_s + without_step, age_s + in_phase)


def _seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


def _lines(folder: Path) -> list[dict[str, Any]]:
    """Those of ``metrics.jsonl`` that are whole."""
    try:
        content = (folder / METRICS).read_bytes()
    except OSError:
        return []
    found = []
    for text in content.splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith(b"\n") else {}
        except ValueError:
            continue  # cut short by a dying process
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            found.append(line)
    return found


def _measured(folder: Path, clock: Clock, lines: Sequence[dict[str, Any]]) -> Measured | None:
    steps: list[dict[str, Any]] = []
    evaluations: list[tuple[int, float]] = []
    for line in lines:
        if "loss" in line:
            steps.append(line)
        elif _number(line.get("eval_loss")) is not None:
            evaluations.append((int(line["step"]), float(line["eval_loss"])))
    if not steps:
        return None
    try:
        dated = (folder / METRICS).stat().st_mtime
    except OSError:  # gone meanwhile
        return None
    last = steps[-1]
    return Measured(
        step=int(last["step"]),
        loss=_number(last["loss"]),
        tokens_per_s=_number(last.get("tokens_per_s")),
        step_time_s=_number(last.get("step_time_s")),
        mfu=_number(last.get("mfu")),
        curve=_curve([_number(line["loss"]) for line in steps]),
        eval_last=evaluations[-1] if evaluations else None,
        eval_best=min(evaluations, key=lambda each: each[1]) if evaluations else None,
        age_s=clock.age_s(dated),
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _curve(losses: Sequence[float | None]) -> tuple[float | None, ...]:
    """Means of as many steps each, at most ``CURVE_POINTS`` of them."""
    count = min(CURVE_POINTS, len(losses))
    borders = [round(i * len(losses) / count) for i in range(count + 1)]
    means: list[float | None] = []
    for first, last in itertools.pairwise(borders):
        finite = [loss for loss in losses[first:last] if loss is not None]
        means.append(sum(finite) / len(finite) if finite else None)
    return tuple(means)


def _bill(folder: Path, receipt: dict[str, Any], pulse: Pulse | None) -> Bill | None:
    """Up to the last sign of life: a session is paid from the start of its process on."""
    sessions = earlier_sessions(folder)
    price = receipt.get("price") or {}
    usd_per_hour = _number(price.get("usd"))
    elapsed_s, spent = sum(each.elapsed_s for each in sessions), total_usd(sessions)
    unbooked_s = 0.0 if pulse is None else _unbooked_s(sessions, pulse.beat)
    if not sessions and not unbooked_s:
        return None
    if spent is not None and usd_per_hour is not None:
        spent += unbooked_s * usd_per_hour / 3600
    return Bill(
        elapsed_s=elapsed_s + unbooked_s,
        starts=max(len(sessions), 1),
        spent_usd=spent,
        usd_per_hour=usd_per_hour,
        jpy_per_usd=_number(price.get("jpy_per_usd")),
        price_name=price.get("name"),
    )


def _unbooked_s(sessions: Sequence[Session], beat: Beat) -> float:
    """Seconds of the process that beats, or beat last, that no session has yet."""
    lived_s = _seconds(beat.written_at) - _seconds(beat.started)
    if not sessions or not sessions[-1].started:
        return lived_s if not sessions else 0.0
    last = sessions[-1]
    is_of_this_process = _seconds(last.started) >= math.floor(_seconds(beat.started))
    if not is_of_this_process:
        return lived_s
    # A process that was started twice in a run writes its own time; one that ended has written all of it.
    return 0.0 if last.ended or last.preempted_by else max(0.0, lived_s - last.elapsed_s)


def _planned(folder: Path, notes: list[str]) -> Planned | None:
    try:
        plan = load_plan(json.loads((folder / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, SftError) as error:
        notes.append(f"{PLAN} cannot be read: {str(error).splitlines()[0]}")
        return None
    chosen = plan.cost.chosen
    return Planned(
        machines=plan.subject.get("machines"),
        step_s=plan.time.step.value,
        total_s=plan.time.total.value,
        usd=None if chosen is None else chosen.usd.value,
        jpy=None if chosen is None else chosen.jpy.value,
    )


def _saved(folder: Path, clock: Clock, notes: list[str]) -> Saved:
    complete = store.complete_checkpoints(folder)
    writing = sorted(
        int(path.name.removesuffix(store.UNFINISHED).rpartition("-")[2])
        for path in folder.glob(f"step-*{store.UNFINISHED}")
    )
    for checkpoint in reversed(complete):
        try:
            manifest = Manifest.read(checkpoint)
            age_s = clock.age_s((checkpoint / MANIFEST).stat().st_mtime)
        except (SftError, OSError) as error:  # damaged, or deleted meanwhile
            if checkpoint.exists():
                notes.append(str(error).splitlines()[0])
            continue
        return Saved(manifest.completed_steps, age_s, len(complete), tuple(writing))
    return Saved(None, None, len(complete), tuple(writing))


def _final(folder: Path, receipt: dict[str, Any]) -> tuple[str | None, bool]:
    """What ``final/`` is, and whether the run is finished with it."""
    if not (folder / FINAL).is_dir():
        return ("unfinished" if (folder / f"{FINAL}{store.UNFINISHED}").is_dir() else None), False
    try:
        settings = read_yaml((folder / "config.yaml").read_text(encoding="utf-8"))
        is_proven = bool(settings["checkpoint"]["prove_final"])
    except (OSError, ValueError, KeyError, TypeError):
        return "there", receipt.get("finished") is True
    return ("proven" if is_proven else "not proven"), receipt.get("finished") is True


def _stopped_at(receipt: dict[str, Any]) -> int | None:
    state = receipt.get("final")
    if not isinstance(state, dict) or not state.get("stopped_early"):
        return None
    step = state.get("trained_steps")
    return step if isinstance(step, int) else None


def _num_steps(pulse: Pulse | None, receipt: dict[str, Any]) -> int | None:
    if pulse is not None and pulse.beat.num_steps is not None:
        return pulse.beat.num_steps
    planned = receipt.get("planned") or {}
    return planned.get("steps")
