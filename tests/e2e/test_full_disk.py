"""A disk that is full while a run trains."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from tests.e2e.test_kill import PATIENCE_S, steps_of, wait_for, write_config
from tests.helpers import figures
from tests.helpers.ranks import Ranks
from tests.helpers.small_disk import small_disk

STEPS = 120
# Until all that the full disk keeps from being written was told.
END_S = 30


def command(config: Path, output: Path) -> list[str]:
    return [
        "train", str(config), f"output_dir={output}", f"train.max_steps={STEPS}", "checkpoint.every_steps=20",
        "logging.wandb.mode=offline",
    ]  # fmt: skip


@pytest.mark.ci
def test_room_in_time(tiny_base: Path, tmp_path: Path) -> None:
    """Checkpoints are missing, lines are not; W&B's files are on that disk too."""
    config, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run.log"
    with small_disk(tmp_path / "disk", size="16m") as disk:
        output = disk.folder / "run"
        with Ranks(2, command(config, output), log) as ranks:
            wait_for(lambda: any((output / "checkpoints").glob("step-000000?0")), ranks)
            disk.fill(output / "metrics.jsonl", ranks.processes[0].pid or 0)
            filled = time.monotonic()
            wait_for(lambda: "metrics.jsonl cannot be written" in log.read_text(), ranks)
            wait_for(lambda: "cannot write" in log.read_text(), ranks)
            told_s = time.monotonic() - filled
            assert told_s < END_S
            disk.free(ranks.processes[0].pid or 0)
            assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
        said = log.read_text()
        lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
        assert json.loads((output / "receipt.json").read_text())["finished"]
    assert said.count(f"metrics.jsonl cannot be written ({disk.reason}): training goes on") == 1
    assert said.count("metrics.jsonl is written again, and has all lines") == 1
    assert "Traceback" not in said
    (lacking,) = re.findall(r"^.*cannot write .*step-.*$", said, re.MULTILINE)[:1]
    figures.fault("a full disk: metrics and checkpoints", told_s, [0, 0], lacking)


@pytest.mark.ci
def test_no_room_to_the_end(tiny_base: Path, tmp_path: Path) -> None:
    config, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run.log"
    with small_disk(tmp_path / "disk", size="16m") as disk:
        output = disk.folder / "run"
        with Ranks(2, command(config, output), log) as ranks:
            wait_for(lambda: any((output / "checkpoints").glob("step-000000?0")), ranks)
            disk.fill(output / "metrics.jsonl", ranks.processes[0].pid or 0)
            filled = time.monotonic()
            assert ranks.exit_codes(PATIENCE_S) == [5, 5], log.read_text()
            took_s = time.monotonic() - filled
        there, said = steps_of(output), log.read_text()
    shown = [json.loads(text)["step"] for text in re.findall(r'^\{"step": .*\}$', said, re.MULTILINE)]
    assert sorted({*there, *shown}) == list(range(1, STEPS + 1))
    assert "Traceback" not in said
    errors = re.findall(r"^error: .*(?:No space left on device|File too large).*$", said, re.MULTILINE)
    assert errors, said
    print(*errors, sep="\n")
    figures.fault("a full disk to the end", took_s, [5, 5], errors[-1])
