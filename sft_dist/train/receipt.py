"""``receipt.json``: what a run was made with, what it was planned to take, and what it took."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import xxhash

from sft_dist.checkpoint import store
from sft_dist.checkpoint.manifest import Identity
from sft_dist.config.schema import Config
from sft_dist.config.secrets import without_secrets
from sft_dist.errors import SftError
from sft_dist.metrics.logger import METRICS
from sft_dist.plan.calibration import Calibration, calibration_folder, calibration_key, record
from sft_dist.plan.expected import Expected
from sft_dist.run import Run
from sft_dist.runtime.whole_file import replace_file
from sft_dist.train.account import Account
from sft_dist.train.outlook import Outlook
from sft_dist.train.resume import checkpoints_folder
from sft_dist.train.run_inputs import inputs_of
from sft_dist.train.sessions import RECEIPT, Session, total_usd
from sft_dist.train.surroundings import code, environment, launcher, machine, versions
from sft_dist.train.waste import Waste

# 2: with all that `sft-dist replay` needs.
FORMAT = 2

# Of final/, what comes from the tokenizer and was not planned.
TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "added_tokens")


@dataclass(frozen=True)
class Actual:
    """What a run took, in the figures of ``Expected``.

    Args:
        peak_allocated_bytes: most of any rank, while training; None on a CPU, which does not count.
        first_step: 1, or what a run began with that went on from a checkpoint of another one: its counts and its time
            are of the rest, and are not compared with a plan of the whole.
        steps, tokens, evaluations: that ``metrics.jsonl`` has, of all sessions.
        checkpoint_bytes: of the newest one; final_bytes: without the tokenizer's files.
        step_s, tokens_per_s: of this session's steady full steps, without the first ones and those after a pause; None
            where there were none. steady_steps: how many there were.
        total_s: wall time of all sessions.
    """

    peak_allocated_bytes: int | None
    first_step: int
    steps: int
    tokens: int
    evaluations: int
    checkpoint_bytes: int | None
    final_bytes: int
    step_s: float | None
    steady_steps: int
    tokens_per_s: float | None
    total_s: float
    cost_usd: float | None


def write_receipt(folder: Path, sessions: tuple[Session, ...], **parts: Mapping[str, Any]) -> None:
    """Replaces the receipt in a run directory.

    Args:
        sessions: of the run; the last one may not have ended.
        parts: of the document, each of which brings its keys.

    Raises:
        OSError: the folder cannot be written.
    """
    document: dict[str, Any] = {"format": FORMAT, "finished": sessions[-1].ended}
    for part in parts.values():
        document |= part
    document["sessions"] = [asdict(session) for session in sessions]
    replace_file(folder / RECEIPT, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def measures(expected: Expected | None, actual: Actual, waste: Waste) -> dict[str, Any]:
    """The part of a receipt that only a finished run has."""
    return {
        "actual": asdict(actual),
        "ratio": None if expected is None else ratios(expected, actual),
        "waste": asdict(waste),
    }


def measured(
    folder: Path, account: Account, sessions: tuple[Session, ...], *, peak_allocated_bytes: int | None
) -> Actual:
    """What the files of a finished run and the account of its last session say."""
    lines = [json.loads(line) for line in (folder / METRICS).read_bytes().splitlines()]
    steps = [line for line in lines if "loss" in line]
    figures = account.figures()
    kept = store.complete_checkpoints(checkpoints_folder(str(folder)))
    return Actual(
        peak_allocated_bytes=peak_allocated_bytes,
        first_step=min((line["step"] for line in steps), default=1),
        steps=len(steps),
        tokens=sum(line["num_tokens"] for line in steps),
        evaluations=sum("eval_loss" in line for line in lines),
        checkpoint_bytes=_bytes(kept[-1]) if kept else None,
        final_bytes=_bytes(folder / "final", but=TOKENIZER_FILES),
        step_s=None if figures is None else figures.step_s,
        steady_steps=0 if figures is None else figures.steps,
        tokens_per_s=None if figures is None else figures.tokens_per_s,
        total_s=sum(session.elapsed_s for session in sessions),
        cost_usd=total_usd(sessions) if account.outlook.price is not None else None,
    )


# Figures of a whole run, and those that are the same for any part of it.
OF_THE_WHOLE = ("steps", "tokens", "evaluations", "total_s")
OF_ANY_PART = ("peak_allocated_bytes", "checkpoint_bytes", "final_bytes", "step_s", "tokens_per_s")


def ratios(expected: Expected, actual: Actual) -> dict[str, float | None]:
    """Actual over planned; None where one of the two is not known, or nothing was planned."""
    found: dict[str, float | None] = {}
    for key in (*OF_ANY_PART, *OF_THE_WHOLE):
        wanted, taken = getattr(expected, key), getattr(actual, key)
        is_comparable = key in OF_ANY_PART or actual.first_step == 1
        found[key] = taken / wanted if is_comparable and wanted and taken is not None else None
    return found


def calibrate(run: Run, gpu: str, expected: Expected, *, step_s: float, steps: int, peak_bytes: int | None) -> bool:
    """Keeps what a run measured against its plan, for the next plan of a run like it; whether it was worth keeping.

    Args:
        gpu: its name in the table.
        step_s: of a full step; steps: that it is the median of.

    Raises:
        OSError: the folder cannot be written.
        ValueError: no seconds were planned.
    """
    if expected.uncalibrated_step_s is None:
        raise ValueError("a step that was not planned says nothing of the plan")
    return record(
        Calibration(
            gpu=gpu,
            key=calibration_key(run),
            time_ratio=step_s / expected.uncalibrated_step_s,
            memory_ratio=None if peak_bytes is None else peak_bytes / expected.peak_allocated_bytes,
            steps=steps,
            date=datetime.now(UTC).date().isoformat(),
            versions=versions(),
        )
    )


def feed_calibration(run: Run, outlook: Outlook, actual: Actual) -> str | None:
    """Keeps what a finished run on a known GPU measured. What is to be said of it, if anything; it stops nothing."""
    machines, expected = outlook.machines, outlook.expected
    if machines is None or expected is None or actual.step_s is None:
        return None
    peak, steps = actual.peak_allocated_bytes, actual.steady_steps
    try:
        calibrate(run, machines.gpu.name, expected, step_s=actual.step_s, steps=steps, peak_bytes=peak)
    except OSError as error:
        why = error.strerror or error
        return f"{calibration_folder()} cannot be written ({why}): the next plan does not learn from this run"
    return None


def template_digest(template: str) -> str:
    """XXH3-128 of the text of a chat template."""
    return xxhash.xxh3_128(template.encode()).hexdigest()


def identity_values(identity: Identity, template: str) -> dict[str, Any]:
    """Who a run is, with its template: what two runs must share to learn the same."""
    return identity.values | {"the chat template": template_digest(template)}


def made_with(run: Run, config: Config, identity: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The part of a receipt that says what a run is, and what it ran with and on: all that a repetition needs.

    Args:
        config: that ``run`` was resolved from; what looks like a secret is hidden, and named.
        identity: as ``identity_values``.
    """
    is_gpu = device.type == "cuda"
    settings = without_secrets(config.model_dump(mode="json"))
    try:
        inputs, unread = inputs_of(config), None
    except SftError as error:  # gone since the data was prepared: this run does not need it any more
        inputs, unread = None, without_secrets(error.what)
    return {
        "versions": versions() | (_of_torch() if is_gpu else {}),
        "code": code(),
        "identity": dict(identity),
        "settings": settings,
        "inputs": inputs,
        "inputs_unread": unread,
        "deepspeed": None if run.deepspeed is None else run.deepspeed.model_dump(mode="json"),
        "topology": {
            "device": torch.cuda.get_device_name(device) if is_gpu else "cpu",
            "processes": run.world.size,
            "nodes": run.world.num_nodes,
            "strategy": run.strategy,
            "sequence_parallel": run.batch.sequence_parallel,
            "launcher": launcher(),
        },
        "machine": machine(),
        "environment": environment(),
        "directory": str(Path.cwd()),
    }


def _of_torch() -> dict[str, str]:
    return {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def planned(outlook: Outlook) -> dict[str, Any]:
    """The part of a receipt that the plan gives, and why where it does not."""
    return {
        "planned": None if outlook.expected is None else asdict(outlook.expected),
        "not_planned": list(outlook.missing),
        "price": None if outlook.price is None else asdict(outlook.price),
    }


def _bytes(folder: Path, *, but: tuple[str, ...] = ()) -> int:
    """Of a folder's own files."""
    return sum(f.stat().st_size for f in folder.iterdir() if f.is_file() and not f.name.startswith(but))
