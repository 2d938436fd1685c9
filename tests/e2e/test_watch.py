"""A run seen from outside by ``sft-dist status``: while it trains, when it hangs, when it is killed and after its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sft_dist.cluster.status import Status, read_status
from tests.e2e.test_kill import PATIENCE_S, write_config
from tests.helpers.ranks import Ranks


def wait_for(output: Path, wanted: Callable[[Status], bool], ranks: Ranks, *, silent_s: float = 60) -> Status:
    until = time.monotonic() + PATIENCE_S
    while not (output / "heartbeat.json").exists() or not wanted(found := read_status(output, silent_s=silent_s)):
        assert time.monotonic() < until, ranks.log.read_text()
        assert ranks.are_alive, ranks.log.read_text()
        time.sleep(0.02)
    return found


def test_a_run_from_its_first_step_to_its_end(tiny_base: Path, tmp_path: Path) -> None:
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    priced = ["hardware.price_per_hour=36", "hardware.fx=150"]
    command = ["train", str(config), "--resume", "auto", f"output_dir={output}", *priced]
    with Ranks(1, [*command, "train.max_steps=100000", "checkpoint.every_steps=5"], log) as ranks:
        found = wait_for(output, lambda s: s.found.saved.newest is not None and s.forecast is not None, ranks)
        assert found.verdict.kind == "working"
        assert not found.verdict.is_trouble
        assert found.found.num_steps == 100000
        assert found.found.pulse is not None
        assert (found.found.pulse.beat.pid, found.found.pulse.beat.world_size) == (ranks.pids[0], 1)
        assert found.found.pulse.age_s < 10
        assert found.found.saved.newest is not None
        assert found.found.bill is not None
        assert found.found.bill.spent_usd is not None
        assert found.found.bill.spent_usd == pytest.approx(found.found.bill.elapsed_s / 100)
        ranks.hold()
        silent = wait_for(output, lambda s: s.verdict.kind == "silent", ranks, silent_s=0.5)
        assert silent.verdict.line.startswith("no sign of life for "), "it holds its lock, so it is not gone"
        assert read_status(output).verdict.kind == "working", "not yet"
        ranks.let_go()
        ranks.kill()
    gone = read_status(output)
    assert gone.verdict.line.startswith("its process is gone"), "its lock is free"
    assert gone.verdict.is_trouble
    assert gone.step is not None
    reached = gone.step + 5
    with Ranks(1, [*command, "train.max_steps=100000"], log) as ranks:
        wait_for(output, lambda s: s.verdict.kind == "working" and (s.step or 0) > reached, ranks)
        ranks.processes[0].terminate()
        assert ranks.exit_codes(PATIENCE_S) == [75], log.read_text()
    stopped = read_status(output)
    assert stopped.verdict.kind == "stopped"
    assert stopped.verdict.line.startswith("preempted by SIGTERM at step ")
    assert stopped.found.bill is not None
    assert stopped.found.bill.starts == 2
    assert stopped.step is not None
    with Ranks(1, [*command, f"train.max_steps={stopped.step + 2}"], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0], log.read_text()
    finished = read_status(output)
    assert finished.verdict.kind == "finished"
    assert finished.step == finished.found.num_steps == stopped.step + 2
    assert finished.found.final == "not proven"
    assert finished.found.bill is not None
    assert finished.found.bill.starts == 3
    assert finished.notes == ()


def test_a_run_that_diverges(tiny_base: Path, tmp_path: Path) -> None:
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    with Ranks(1, ["train", str(config), f"output_dir={output}", "optim.lr=1e30"], log) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [6], log.read_text()
    found = read_status(output)
    assert found.verdict.line.startswith("failed with 6 (diverged) at step ")
    assert "loss" in found.verdict.line
    assert found.verdict.is_trouble
