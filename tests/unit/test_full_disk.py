"""What is written beside checkpoints while the disk is full: nothing ends a run, and no line is lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sft_dist.config.schema import Config
from sft_dist.errors import CheckpointError, ConfigError
from sft_dist.metrics.line_file import LineFile
from sft_dist.metrics.logger import RunLogger, keep_lines
from sft_dist.train.preflight import preflight
from sft_dist.train.run_files import keep_file, writing_into
from tests.helpers.small_disk import SmallDisk, small_disk
from tests.unit.test_logger import OFF, FakeWandb, line, to_wandb, wandb, written

__all__ = ["wandb"]  # a fixture


@pytest.fixture(params=["tmpfs", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", mounted=request.param == "tmpfs") as made:
        yield made


def numbers(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_lines_wait_for_room_and_come_in_order(disk: SmallDisk) -> None:
    path = disk.folder / "lines"
    file = LineFile(path)
    file.write("first")
    disk.fill(path)
    lines = [f"{number}: " + "x" * 500 for number in range(20)]
    for text in lines:
        file.write(text)
        assert path.read_bytes().endswith(b"\n"), "no part of a line stays, whoever reads it now"
    assert file.problem == disk.reason
    assert 0 < len(file.waiting) <= 20
    assert ["first", *lines] == [*numbers(path), *file.waiting]
    disk.free()
    file.write("last")
    assert file.problem is None
    assert numbers(path) == ["first", *lines, "last"]
    file.close()


def test_a_line_that_a_dying_process_left_half_is_removed(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("one\ntwo\nthr")
    file = LineFile(tmp_path / "lines")
    file.write("three")
    file.close()
    assert numbers(tmp_path / "lines") == ["one", "two", "three"]
    (tmp_path / "lines").write_text("half")
    LineFile(tmp_path / "lines").close()
    assert numbers(tmp_path / "lines") == []


def test_a_part_of_a_line_that_could_not_be_cut_off_at_once_is_cut_off_later(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = disk.folder / "lines"
    file = LineFile(path)
    file.write("first")
    disk.fill(path)
    truncate, failures = os.ftruncate, [True]

    def fail_once(*arguments: int) -> None:
        if failures:
            failures.clear()
            raise OSError(5, "Input/output error")
        truncate(*arguments)

    monkeypatch.setattr(os, "ftruncate", fail_once)
    file.write("y" * 9000)
    assert not path.read_bytes().endswith(b"\n"), "half of it is there"
    disk.free()
    file.write("last")
    assert numbers(path) == ["first", "y" * 9000, "last"]
    file.close()


def test_a_run_goes_on_and_says_so_once(disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk.folder / "metrics.jsonl"
    with RunLogger(disk.folder, OFF, {}, num_steps=100) as logger:
        logger.training_step(line(1))
        disk.fill(path)
        for step in range(2, 99):
            logger.training_step(line(step))
        disk.free()
        logger.training_step(line(99))
        logger.require_written()
    assert [entry["step"] for entry in written(disk.folder)] == list(range(1, 100))
    said = capsys.readouterr().out
    assert said.count(f"metrics.jsonl cannot be written ({disk.reason}): training goes on, its lines wait") == 1
    assert said.count("metrics.jsonl is written again, and has all lines") == 1
    assert "W&B" not in said


def test_what_has_no_room_until_the_end_is_shown_and_an_error(
    disk: SmallDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    path = disk.folder / "metrics.jsonl"

    def run() -> None:
        with RunLogger(disk.folder, OFF, {}, num_steps=100) as logger:
            logger.training_step(line(1))
            disk.fill(path)
            for step in range(2, 100):
                logger.training_step(line(step))
            logger.require_written()

    with pytest.raises(CheckpointError) as caught:
        run()
    there = [entry["step"] for entry in written(disk.folder)]
    assert caught.value.what == f"{path} cannot be written ({disk.reason}): {99 - len(there)} lines are missing"
    assert caught.value.exit_code == 5
    shown = [json.loads(text) for text in capsys.readouterr().out.splitlines() if text.startswith("{")]
    assert there + [entry["step"] for entry in shown] == list(range(1, 100))
    assert shown[0] == line(there[-1] + 1)


def test_a_run_that_fails_shows_them_too(disk: SmallDisk, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with RunLogger(disk.folder, OFF, {}, num_steps=100) as logger:
            disk.fill(disk.folder / "metrics.jsonl")
            for step in range(1, 100):
                logger.training_step(line(step))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert '"step": 99' in capsys.readouterr().out


def test_a_console_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    """Its output goes to a file on the full disk, or its terminal is gone."""
    program = f"""
from pathlib import Path
from tests.unit.test_logger import OFF, line
from sft_dist.metrics.logger import RunLogger
with RunLogger(Path({str(tmp_path)!r}), OFF, {{}}, num_steps=3) as logger:
    for step in (1, 2, 3):
        logger.training_step(line(step))
    logger.require_written()
Path({str(tmp_path)!r}, "reached").touch()
"""
    with open("/dev/full", "w") as full:
        subprocess.run([sys.executable, "-c", program], stdout=full, stderr=subprocess.DEVNULL)
    assert (tmp_path / "reached").exists()
    assert [entry["step"] for entry in written(tmp_path)] == [1, 2, 3]


def test_a_resumed_run_can_shorten_its_lines_on_a_full_disk(disk: SmallDisk) -> None:
    path = disk.folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 50)))
    disk.fill(path)
    keep_lines(path, completed=20)
    assert [entry["step"] for entry in written(disk.folder)] == list(range(1, 21))


def test_the_end_of_wandb_ends_no_run(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "finish", fail)
    with RunLogger(tmp_path, to_wandb(), {}, num_steps=1) as logger:
        logger.training_step(line(1))
    assert capsys.readouterr().out.count("W&B takes nothing more ([Errno 28] No space left on device)") == 1


def test_a_small_file_is_replaced_whole_or_not_at_all(disk: SmallDisk) -> None:
    path = disk.folder / "config.yaml"
    before = "a: 1\n" * 2000
    keep_file(path, before)
    disk.fill(disk.folder / "nothing")
    keep_file(path, before)
    with pytest.raises(ConfigError) as caught, writing_into(disk.folder):
        keep_file(path, "b: 2\n" * 2000)
    assert caught.value.what == f"output_dir: {disk.folder} cannot be written ({disk.reason})"
    assert path.read_text() == before
    assert not path.with_name("config.yaml.new").exists()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder where nobody can write, root neither: mounted so, where that is allowed."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    elif os.getuid():
        folder.chmod(0o555)
        yield folder
    else:
        yield Path("/proc")


@pytest.mark.parametrize("name", ["", "run"])
def test_a_read_only_output_dir_is_told_at_once(tmp_path: Path, read_only: Path, name: str) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    config = Config.model_validate(
        {
            "model": {"path": "some/model"},
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
            "train": {"global_batch_size": 1, "max_steps": 1},
            "output_dir": str(read_only / name),
        }
    )
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    assert re.fullmatch(rf"output_dir: {read_only / name} cannot be written \([^)]+\)", caught.value.what)
    assert caught.value.fix == "set output_dir to a folder you may write, on a disk with room"
