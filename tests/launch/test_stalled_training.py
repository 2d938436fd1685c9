"""Real trainings under the launchers, of which one process is stopped: named, ended, and started again if that was asked."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_kill import run_to_the_end, write_config
from tests.launch.test_signals import LAUNCHERS
from tests.launch.test_stopped_training import PATIENCE_S, SHORTER, figures_of, launched, trainers, wait_for_step

LIMIT_S = 3.0
LIMITS = [f"watchdog.{name}_s={LIMIT_S}" for name in ("data", "step", "save")]


def stop_one(launcher: object, output: Path, log: Path) -> list[psutil.Process]:
    """SIGSTOP to rank 1 in the middle of training; all of them."""
    wait_for_step(6, output, launcher, log)  # type: ignore[arg-type]
    ranks = trainers(launcher)  # type: ignore[arg-type]
    os.kill(ranks[1].pid, signal.SIGSTOP)
    return ranks


@pytest.mark.ci
@pytest.mark.parametrize("program", LAUNCHERS)
def test_a_launch_ends_with_its_code_and_leaves_nobody(tiny_base: Path, tmp_path: Path, program: str) -> None:
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    with launched([*LAUNCHERS[program], "train", str(config), f"output_dir={output}", *LIMITS], log) as launcher:
        ranks = stop_one(launcher, output, log)
        stopped = time.monotonic()
        assert launcher.wait(PATIENCE_S) == 8, log.read_text()
        took_s = time.monotonic() - stopped
        print(f"{program}: over {took_s:.1f} s after SIGSTOP")
        assert took_s < LIMIT_S + 30 + 10  # one that does not look at the end of its processes by itself
        assert not [rank.pid for rank in ranks if rank.is_running()]
    text = log.read_text()
    assert text.count("gives no sign of life: its process is stopped") == 1
    assert "Traceback" not in text
    (file,) = (output / "stalls").glob("*/verdict.json")
    assert json.loads(file.read_text())["ranks"] == [1]


@pytest.mark.ci
def test_it_is_started_again(tiny_base: Path, tmp_path: Path) -> None:
    """With another start, whose ranks hang no more; it ends as if nothing had happened."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    options = ["torchrun.sh", "--nproc-per-node", "2", "--max-restarts", "1"]
    with launched([*options, "train", str(config), SHORTER, f"output_dir={output}", *LIMITS], log) as launcher:
        stop_one(launcher, output, log)
        assert launcher.wait(PATIENCE_S) == 0, log.read_text()
    text = log.read_text()
    assert "starting all again, restart 1 of 1" in text
    assert "restart 1: going on from the newest checkpoint" in text
    run_to_the_end(config, tmp_path / "whole", SHORTER)
    assert figures_of(output) == figures_of(tmp_path / "whole")
