"""Two launches, one run directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sft_dist.train import run_lock
from tests.e2e.test_kill import PATIENCE_S, STEPS, steps_of, wait_for, write_config
from tests.helpers.ranks import Ranks


def arguments(config: Path, output: Path) -> list[str]:
    return ["train", str(config), "--resume", "auto", f"output_dir={output}"]


@pytest.mark.ci
def test_the_second_is_locked_out_and_the_first_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    config, output = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run"
    # Long enough for the other to wait out its patience.
    command = [*arguments(config, output), "train.max_steps=4000", "checkpoint.every_steps=1000"]
    with Ranks(2, command, tmp_path / "first.log") as first:
        wait_for(lambda: bool(steps_of(output)), first)
        with Ranks(2, command, tmp_path / "second.log") as second:
            assert second.exit_codes(PATIENCE_S) == [2, 2]
        said = (tmp_path / "second.log").read_text()
        pid = json.loads((output / ".lock").read_text())["pid"]
        assert pid == first.processes[0].pid
        assert len(re.findall(rf"is in use by process {pid} on \S+ since \S+: waiting 10 s for its end", said)) == 1
        assert re.search(rf"error: output_dir: {output} is in use by process {pid} on", said)
        reached = max(steps_of(output))
        wait_for(lambda: max(steps_of(output)) > reached, first)
        assert first.are_alive
    steps = steps_of(output)
    assert steps == sorted(set(steps)), "nothing was trained or shortened by the second"


def test_a_run_waits_for_one_that_is_being_killed(tiny_base: Path, tmp_path: Path) -> None:
    config, output = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run"
    output.mkdir()
    run_lock.hold(output, say=pytest.fail)
    log = tmp_path / "run.log"
    with Ranks(2, [*arguments(config, output), "train.max_steps=2"], log) as ranks:
        try:
            wait_for(lambda: ": waiting 10 s for its end" in log.read_text(), ranks)
            assert {path.name for path in output.iterdir()} == {".lock", "logs", "heartbeats"}, (
                "all else is written later"
            )
        finally:
            run_lock._close_in_child()
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    assert steps_of(output)[-1] == 2 < STEPS
