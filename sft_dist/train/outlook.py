"""What a run that is about to start is planned to take and cost. Nothing here stops it: it trains as well without."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from sft_dist.config.schema import Config
from sft_dist.data.prepared import PreparedData
from sft_dist.errors import UnknownHardware
from sft_dist.plan.bill import HourlyPrice, hourly_price
from sft_dist.plan.data import counted_plan
from sft_dist.plan.expected import Expected, expect
from sft_dist.plan.machines import Machines, machines_here
from sft_dist.plan.result import Plan
from sft_dist.plan.to_json import PLAN, plan_text
from sft_dist.run import Run
from sft_dist.train.run_files import keep_file

NO_GPU = "trained on a CPU: no seconds are planned, and device memory is not counted"


@dataclass(frozen=True)
class Outlook:
    """
    Args:
        machines: of the run; None: a CPU, or a GPU that is not in the table.
        expected: None where no plan could be made.
        price: None where none is known.
        missing: why something is None, a line each; the first one is ``NO_GPU`` on a CPU.
    """

    machines: Machines | None
    expected: Expected | None
    price: HourlyPrice | None
    missing: tuple[str, ...] = ()


def look_ahead(
    config: Config, run: Run, device: torch.device, train_data: PreparedData, eval_data: PreparedData | None
) -> Outlook:
    """Plans a resolved run on its own data; rank 0's.

    Writes ``plan.json`` where the GPU is known and there is none, or one of another subject, for instance of machines
    that were thought of: what is shown as the plan of the run is to be its own.
    """
    missing: list[str] = []
    machines = expected = price = None
    if device.type == "cuda":
        try:
            machines = machines_here(config.hardware, run.world, torch.cuda.get_device_name(device))
        except UnknownHardware as error:
            missing.append(f"{error.what}: no seconds are planned; {error.fix}")
    else:
        missing.append(NO_GPU)
        if config.hardware.gpu is not None:
            missing.append(f"hardware.gpu is {config.hardware.gpu}, but torch sees no GPU here: this trains on the CPU")
    # A plan traces the model through other people's code, and reads files of prices. A run that trains must not end
    # because one of these fails: the failure is told, and written into the receipt.
    try:
        data = counted_plan(run, train_data, eval_data, source="counted by the run")
        expected, plan = expect(config, run, machines, data)
        if plan is not None and not _is_there(Path(run.output_dir), plan):
            _write_plan(Path(run.output_dir), plan_text(plan) + "\n", missing)
    except Exception as error:
        missing.append(f"no plan to compare with: {_told(error)}")
    try:
        price = hourly_price(config.hardware, machines, num_processes=run.world.size)
    except Exception as error:
        missing.append(f"no bill: {_told(error)}")
    return Outlook(machines, expected, price, tuple(missing))


def _is_there(folder: Path, plan: Plan) -> bool:
    """Whether the folder has one of the same subject; its data may be known otherwise."""
    try:
        written = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(written, dict) and written.get("subject") == plan.subject


def _write_plan(folder: Path, text: str, missing: list[str]) -> None:
    """The plan is of use without the file."""
    try:
        keep_file(folder / PLAN, text)
    except OSError as error:
        missing.append(f"{PLAN} cannot be written: {error.strerror or error}")


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
