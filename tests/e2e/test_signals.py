"""Signals to real training processes: all ranks save and leave with 75, and the run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from sft_dist.checkpoint.store import complete_checkpoints
from tests.e2e.test_kill import PATIENCE_S, Run, run_to_the_end, steps_of, strike, wait_for, write_config
from tests.helpers.ranks import Ranks

SAVING = "saving a checkpoint at the end of a step; press Ctrl-C again to leave now"


def send(ranks: Ranks, number: signal.Signals, to: tuple[int, ...]) -> None:
    for rank in to:
        pid = ranks.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


def stop_by_signal(config: Path, output: Path, log: Path, moment: str, number: signal.Signals, to: tuple[int, ...]) -> int:  # fmt: skip
    """Starts or resumes a run of two ranks and sends a signal; the step that it was left at."""
    with Ranks(2, ["train", str(config), "--resume", "auto", f"output_dir={output}"], log) as ranks:
        first = max(steps_of(output), default=0)
        wait_for(lambda: max(steps_of(output), default=0) > first + 1, ranks)
        strike(moment, Run(output, log), ranks, random.Random(3))
        send(ranks, number, to)
        assert ranks.exit_codes(PATIENCE_S) == [75, 75], log.read_text()
    text = log.read_text()
    step = max(steps_of(output))
    saved = output / "checkpoints" / f"step-{step:08d}"
    assert text.count("preempted by") == 1
    assert f"preempted by {number.name} at step {step}: saved {saved}; go on with --resume auto\n" in text
    assert "error:" not in text
    assert "Traceback" not in text
    assert complete_checkpoints(output / "checkpoints")[-1] == saved
    assert text.count(f"saved and read back {saved}") == 1
    assert not (output / "final").exists()
    receipt = json.loads((output / "receipt.json").read_text())
    assert (receipt["finished"], receipt["sessions"][-1]["preempted_by"]) == (False, number.name)
    assert receipt["sessions"][-1]["elapsed_s"] > 0
    return step


def test_a_run_that_is_stopped_again_and_again_ends_as_if_nothing_had_happened(tiny_base: Path, tmp_path: Path) -> None:
    config, output = write_config(tiny_base, tmp_path, "fsdp2", "lora"), tmp_path / "stopped"
    steps = [
        stop_by_signal(config, output, tmp_path / "1.log", "step", signal.SIGTERM, (1,)),
        stop_by_signal(config, output, tmp_path / "2.log", "writing", signal.SIGUSR1, (0, 1)),
        stop_by_signal(config, output, tmp_path / "3.log", "step", signal.SIGINT, (0,)),
    ]
    assert steps == sorted(set(steps))
    assert (tmp_path / "3.log").read_text().count(SAVING) == 1
    assert SAVING not in (tmp_path / "1.log").read_text()
    whole = run_to_the_end(config, tmp_path / "whole")
    assert run_to_the_end(config, output, "--resume", "auto") == whole
    weights = "final/adapter_model.safetensors"
    assert (output / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    sessions = json.loads((output / "receipt.json").read_text())["sessions"]
    assert [session["preempted_by"] for session in sessions] == ["SIGTERM", "SIGUSR1", "SIGINT", None]
    assert [session["first_step"] for session in sessions] == [1, *(step + 1 for step in steps)]


def test_a_second_interrupt_leaves_at_once_even_a_run_that_hangs(tiny_base: Path, tmp_path: Path) -> None:
    """A peer that is stopped never comes to the collective in which rank 0 waits for it."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "out", tmp_path / "log"
    with Ranks(2, ["train", str(config), f"output_dir={output}"], log) as ranks:
        wait_for(lambda: max(steps_of(output), default=0) > 1, ranks)
        send(ranks, signal.SIGSTOP, (1,))
        time.sleep(0.2)
        for _ in range(2):  # one key press: from the terminal, and from the launcher
            send(ranks, signal.SIGINT, (0,))
            time.sleep(0.1)
        wait_for(lambda: SAVING in log.read_text(), ranks)
        ranks.processes[0].join(1.0)
        assert ranks.processes[0].is_alive()
        send(ranks, signal.SIGINT, (0,))
        ranks.processes[0].join(5.0)
        assert ranks.processes[0].exitcode == 130, log.read_text()
    assert log.read_text().count(SAVING) == 1
    assert "interrupted: what was saved stays" in log.read_text()


@pytest.mark.parametrize(
    ("strategy", "method"),
    [
        pytest.param("ddp", "full", marks=pytest.mark.full),
        pytest.param("zero1", "lora", marks=pytest.mark.full),
        pytest.param("zero3", "full", marks=pytest.mark.ci),
    ],
)
def test_under_other_strategies(tiny_base: Path, tmp_path: Path, strategy: str, method: str) -> None:
    config, output = write_config(tiny_base, tmp_path, strategy, method), tmp_path / "stopped"
    stop_by_signal(config, output, tmp_path / "1.log", "writing", signal.SIGTERM, (0,))
    stop_by_signal(config, output, tmp_path / "2.log", "step", signal.SIGUSR1, (1,))
    assert run_to_the_end(config, output, "--resume", "auto") == run_to_the_end(config, tmp_path / "whole")
