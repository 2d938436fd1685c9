"""A loss that jumps and a tracker that is dead or frozen, planted into real runs of two processes.

Each fault of this kind is a line of the table at the end of the tests, with those that hang a rank (test_watchdog.py),
make a loss NaN (test_diverged.py) and fill a disk (test_full_disk.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sft_dist.metrics.wandb_run import CORE, OFFLINE_S
from sft_dist.model.build import SftModel
from sft_dist.train import loop
from tests.e2e.test_kill import EVERY, STEPS, steps_of, wait_for, write_config
from tests.e2e.test_watchdog import GUILTY, is_left
from tests.helpers import figures
from tests.helpers.offline_wandb import offline_runs
from tests.helpers.ranks import Ranks

PATIENCE_S = 120
# From what was planted until it was told, or no process is left.
END_S = 30
SPIKE_AT, STRIKE_AT = 10, 9
STRUCK = "struck process "


def spike(rank: int) -> None:
    """One step's loss is about ten times what it is: that of one of two ranks nineteen times."""
    if rank != GUILTY:
        return
    forward, train_step, calls = SftModel.forward, loop.train_step, 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return train_step(*arguments, **keywords)

    def larger(self: SftModel, *arguments: Any, logits: bool = False, **keywords: Any) -> torch.Tensor:
        result: torch.Tensor = forward(self, *arguments, logits=logits, **keywords)
        return 19 * result if calls == SPIKE_AT and not logits else result

    loop.train_step = counted
    SftModel.forward = larger  # type: ignore[method-assign]


def test_a_loss_ten_times_as_large(tiny_base: Path, tmp_path: Path) -> None:
    """The state before it is put back within seconds, and the run ends without the step."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    command = ["train", str(config), f"output_dir={output}", "train.max_steps=14", "spikes.policy=roll_back"]
    with Ranks(2, [*command, "spikes.window=8"], log, before=spike) as ranks:
        wait_for(lambda: max(steps_of(output), default=0) >= SPIKE_AT - 1, ranks)
        planted = time.monotonic()
        wait_for(lambda: "; back at step" in log.read_text(), ranks)
        told_s = time.monotonic() - planted
        codes = ranks.exit_codes(PATIENCE_S)
    said = log.read_text()
    assert codes == [0, 0], said
    assert told_s < END_S
    lines = [json.loads(line) for line in (output / "metrics.jsonl").open()]
    (back,) = (line for line in lines if line.get("event") == "rolled_back")
    saved = (SPIKE_AT - 1) // EVERY * EVERY
    assert (back["step"], back["of_step"], back["because"], back["ranks"]) == (saved, SPIKE_AT, "spike", [GUILTY])
    assert 8 < back["of_loss"] / back["median_loss"] < 12
    (line,) = (line for line in said.splitlines() if "; back at step" in line)
    assert f"seen by rank {GUILTY} on {socket.gethostname()}, first in {tmp_path}/rows.jsonl:" in line
    assert [line["step"] for line in lines if "loss" in line] == [n for n in range(1, 15) if n != SPIKE_AT]
    figures.fault("a spike x 10", told_s, codes, line)


def strike_core(number: signal.Signals, rank: int) -> None:
    """W&B's own process, which rank 0 has started, gets a signal in the middle of training; its number is printed."""
    if rank:
        return
    train_step, calls = loop.train_step, 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == STRIKE_AT:
            (core,) = (child for child in psutil.Process().children(recursive=True) if CORE in child.name())
            print(f"{STRUCK}{core.pid}")
            core.send_signal(number)
        return train_step(*arguments, **keywords)

    loop.train_step = counted


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="frozen", marks=pytest.mark.ci)],
)
def test_a_tracker_that_does_not_answer(tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """No step waits for it, and the run ends in order; what it has measured is in its own file."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    command = ["train", str(config), f"output_dir={output}", "logging.wandb.mode=offline"]
    with Ranks(2, command, log, before=partial(strike_core, number)) as ranks:
        wait_for(lambda: max(steps_of(output), default=0) == STEPS, ranks)
        trained = time.monotonic()
        codes = ranks.exit_codes(PATIENCE_S)
        took_s = time.monotonic() - trained
    said = log.read_text()
    (core,) = (int(line.removeprefix(STRUCK)) for line in said.splitlines() if line.startswith(STRUCK))
    if is_left(core):
        os.kill(core, signal.SIGKILL)
        pytest.fail("the run has left W&B's process behind")
    assert codes == [0, 0], said
    assert took_s < END_S
    assert steps_of(output) == list(range(1, STEPS + 1))
    if number == signal.SIGKILL:
        how, newest, told = "killed", offline_runs(output)[-1], "W&B is started again and has every step"
        assert sorted(set(newest.steps)) == list(range(1, STEPS + 1))
        assert newest.exit_code == 0
    else:
        how = "frozen"
        (told,) = (line for line in said.splitlines() if "W&B takes nothing more" in line)
        assert f"it has not ended within {OFFLINE_S:.0f} s" in told
    figures.fault(f"W&B's process is {how}: after the last step", took_s, codes, told)
