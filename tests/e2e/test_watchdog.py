"""A rank that hangs: found, named and left within seconds of its limit, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sft_dist import cli
from sft_dist.checkpoint import checkpointer
from sft_dist.checkpoint.manifest import Manifest
from sft_dist.checkpoint.proof import verify_files
from sft_dist.checkpoint.shard_file import file_name
from sft_dist.checkpoint.store import complete_checkpoints
from sft_dist.data.loader import collate
from sft_dist.metrics.heartbeat import Beat
from sft_dist.train import step
from sft_dist.watchdog.limits import Limits
from tests.e2e.test_kill import run_to_the_end, steps_of, write_config
from tests.helpers import figures
from tests.helpers.ranks import Ranks

GUILTY, AT_STEP, EVERY = 1, 9, 4
END_OF_EPOCH = 10  # where the next checkpoint is due
LIMIT_S = 3.0
PATIENCE_S, FOR_EVER_S = 60, 3600

FEW = "train.max_steps=16"
LIMITS = [FEW, *(f"watchdog.{name}_s={LIMIT_S}" for name in ("data", "step", "save"))]


def _from_call(number: int, function: Callable[..., Any], trouble: Callable[[], object]) -> Callable[..., Any]:
    """``function``, with ``trouble`` before it from the call with that number on."""
    calls = 0

    def called(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= number:
            trouble()
        return function(*arguments, **keywords)

    return called


def _hang() -> None:
    time.sleep(FOR_EVER_S)


def in_forward(rank: int) -> None:
    """A layer of the model never returns."""
    if rank == GUILTY:
        calls = 0

        def hook(module: torch.nn.Module, _inputs: object) -> None:
            nonlocal calls
            calls += type(module).__name__ == "LlamaDecoderLayer" and torch.is_grad_enabled()
            if calls > 40:
                _hang()

        torch.nn.modules.module.register_module_forward_pre_hook(hook)


def in_data(rank: int) -> None:
    """The next micro-batch never comes."""
    if rank == GUILTY:
        import sft_dist.data.loader

        sft_dist.data.loader.collate = _from_call(AT_STEP, collate, _hang)


def in_save(rank: int) -> None:
    """The second file is written into a pipe that nobody reads."""
    if rank == GUILTY:
        write = checkpointer.write_shard
        calls = 0

        def into_a_pipe(path: Path, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                os.mkfifo(path)
            return write(path, *arguments)

        checkpointer.write_shard = into_a_pipe


def in_c(rank: int) -> None:
    """Something keeps the interpreter: no thread of Python runs in this process any more."""
    if rank == GUILTY:
        import ctypes

        library = ctypes.PyDLL(None)
        step.micro_batches = _from_call(AT_STEP, step.micro_batches, lambda: library.sleep(FOR_EVER_S))


def is_left(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def stalled_run(
    config: Path,
    folder: Path,
    planted: str,
    *,
    size: int = 2,
    before: Callable[[int], None] | None = None,
    strike: Callable[[Ranks], None] | None = None,
) -> tuple[dict[str, Any], list[int | None], str, Path]:
    """The verdict, the exit codes, what was printed, and the run directory; all within 30 s of the limit."""
    output, log = folder / "run", folder / "log"
    with Ranks(size, ["train", str(config), f"output_dir={output}", *LIMITS], log, before=before) as ranks:
        pids = ranks.pids
        if strike is not None:
            while max(steps_of(output), default=0) < AT_STEP:
                assert ranks.are_alive, log.read_text()
                time.sleep(0.01)
            strike(ranks)
        last, moved = 0, time.monotonic()
        while ranks.are_alive:
            now = max(steps_of(output), default=0)
            if now != last:
                last, moved = now, time.monotonic()
            if now:
                assert time.monotonic() - moved < LIMIT_S + 30, log.read_text()
            time.sleep(0.05)
        took_s = time.monotonic() - moved
        codes = ranks.exit_codes(PATIENCE_S)
    assert took_s < LIMIT_S + 30
    assert not [pid for pid in pids if is_left(pid)]
    (file,) = (output / "stalls").glob("*/verdict.json")
    assert {path.name for path in file.parent.iterdir()} == {"verdict.json", *(f"rank-{r}.txt" for r in range(size))}
    found = json.loads(file.read_text())
    figures.fault(planted, took_s, codes, found["what"])
    return found, codes, log.read_text(), output


def must_go_on(config: Path, output: Path, whole: Path | None = None) -> None:
    """What is committed is whole, and the run ends; as ``whole`` does, to which nothing happened."""
    there = complete_checkpoints(output / "checkpoints")
    assert there
    for path in there:
        assert verify_files(path, Manifest.read(path), part=0, parts=1) == []
    numbers = run_to_the_end(config, output, "--resume", "auto", FEW)
    assert [each["step"] for each in numbers] == list(range(1, 17))
    if whole is not None:
        assert numbers == run_to_the_end(config, whole, FEW)
    assert not (output / "heartbeats").exists()


def the_end(output: Path) -> Beat:
    beat = Beat.read(output)
    assert beat is not None
    return beat


def test_a_rank_that_hangs_in_forward(tiny_base: Path, tmp_path: Path) -> None:
    config = write_config(tiny_base, tmp_path, "ddp", "lora")
    found, codes, log, output = stalled_run(config, tmp_path, "sleeps in forward", before=in_forward)
    assert codes == [8, 8]
    assert (found["ranks"], found["is_silent"], found["phase"], found["part"]) == ([GUILTY], False, "training", "")
    assert found["host"] == socket.gethostname()
    assert found["limit_s"] == LIMIT_S <= found["still_s"] < LIMIT_S + 10
    assert log.count("error: ") == 1
    assert f"error: rank {GUILTY} on {socket.gethostname()} stalls: training, after step " in log
    assert "more than watchdog.step_s = 3)" in log
    beat = the_end(output)
    assert (beat.phase, beat.during, beat.exit_code, beat.what) == ("failed", "training", 8, found["what"])
    stacks = [next((output / "stalls").glob(f"*/rank-{rank}.txt")).read_text() for rank in (0, 1)]
    assert " in _hang" in stacks[GUILTY]
    assert " in _hang" not in stacks[0]
    assert all(" in train_step" in text and "threads in the kernel" in text for text in stacks)
    must_go_on(config, output, tmp_path / "whole")


@pytest.mark.ci
def test_a_rank_that_waits_for_its_data(tiny_base: Path, tmp_path: Path) -> None:
    """Of three: the other two are in a collective of the step."""
    config = write_config(tiny_base, tmp_path, "fsdp2", "lora")
    found, codes, log, output = stalled_run(config, tmp_path, "sleeps in its data", size=3, before=in_data)
    assert codes == [8, 8, 8]
    assert (found["ranks"], found["is_silent"], found["phase"], found["part"]) == ([GUILTY], False, "training", "data")
    assert f"rank {GUILTY} on {socket.gethostname()} stalls: waiting for its data, after step " in log
    assert [place["part"] for place in found["places"]] == ["", "data", ""]
    must_go_on(config, output)


@pytest.mark.ci
def test_a_rank_that_cannot_write_its_checkpoint(tiny_base: Path, tmp_path: Path) -> None:
    """The thread that writes hangs, and training only where it waits for that."""
    config = write_config(tiny_base, tmp_path, "fsdp2", "full")
    found, codes, log, output = stalled_run(config, tmp_path, "hangs in a save", before=in_save)
    assert codes == [8, 8]
    assert (found["ranks"], found["is_silent"], found["phase"]) == ([GUILTY], False, "saving")
    assert f"rank {GUILTY} on {socket.gethostname()} stalls: saving, after step {END_OF_EPOCH}, since " in log
    assert [path.name for path in complete_checkpoints(output / "checkpoints")] == [f"step-{EVERY:08d}"]
    must_go_on(config, output)


@pytest.mark.parametrize("guilty", [pytest.param(0, marks=pytest.mark.ci), 1])
def test_a_rank_that_is_stopped(tiny_base: Path, tmp_path: Path, guilty: int) -> None:
    """It says nothing and cannot leave: the others name it, also where it is the one that keeps the store."""
    config = write_config(tiny_base, tmp_path, "ddp", "lora")
    found, codes, log, output = stalled_run(
        config, tmp_path, f"rank {guilty} is stopped", strike=lambda ranks: os.kill(ranks.pids[guilty], signal.SIGSTOP)
    )
    assert (codes[guilty], codes[1 - guilty]) == (-signal.SIGKILL, 8)
    assert (found["ranks"], found["is_silent"], found["host"]) == ([guilty], True, socket.gethostname())
    assert f"rank {guilty} on {socket.gethostname()} gives no sign of life: its process is stopped; it was " in log
    # Its timer never fired: that reads the stacks of threads that run, and may freeze all of them.
    (stacks,) = (output / "heartbeats").glob(f"*/rank-{1 - guilty}.stacks")
    assert stacks.read_text() == ""
    beat = the_end(output)
    assert (beat.phase, beat.exit_code, beat.what) == ("failed", 8, found["what"])
    must_go_on(config, output)


@pytest.mark.ci
def test_a_rank_whose_interpreter_is_held(tiny_base: Path, tmp_path: Path) -> None:
    config = write_config(tiny_base, tmp_path, "ddp", "lora")
    found, codes, _, output = stalled_run(config, tmp_path, "holds the interpreter", before=in_c)
    assert codes == [8, -signal.SIGKILL]
    assert (found["ranks"], found["is_silent"]) == ([GUILTY], True)
    stacks = next((output / "stalls").glob(f"*/rank-{GUILTY}.txt")).read_text()
    assert " in train_step" in stacks, "a timer in C has written them"


def test_limits_hear_of_the_disk(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run reads and writes, with the time that it took."""
    config, output = write_config(tiny_base, tmp_path, "ddp", "full"), tmp_path / "run"
    read, saved = list[tuple[int, float]](), list[tuple[int, float]]()
    monkeypatch.setattr(Limits, "read", lambda _, num_bytes, seconds: read.append((num_bytes, seconds)))
    monkeypatch.setattr(Limits, "saved", lambda _, num_bytes, seconds: saved.append((num_bytes, seconds)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(config), f"output_dir={output}", "train.max_steps=6"])
    assert ended.value.code == 0
    files = [path / file_name(0, 1) for path in complete_checkpoints(output / "checkpoints")]
    assert [num_bytes for num_bytes, _ in saved] == [path.stat().st_size for path in files]
    assert read == sorted(read)
    assert read[-1][0] == pytest.approx((tiny_base / "model.safetensors").stat().st_size, rel=0.05)
    assert all(seconds > 0 for _, seconds in (*read, *saved))


def slow_start(rank: int) -> None:
    """A first step and an evaluation that take much longer than any other."""
    step.micro_batches = _slow_at_first(step.micro_batches)


def _slow_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def called(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        time.sleep(6.0 if calls == 1 else 0.0)
        return function(*arguments, **keywords)

    return called


@pytest.mark.ci
def test_a_healthy_run_is_not_ended(tiny_base: Path, tmp_path: Path) -> None:
    """A long first step under the limits that nobody sets, and ranks that are suspended for longer than their limit."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    few = ["train.max_steps=12", "checkpoint.every_steps=6", "watchdog.save_s=3"]
    with Ranks(2, ["train", str(config), f"output_dir={output}", *few], log, before=slow_start) as ranks:
        while max(steps_of(output), default=0) < 3:
            assert ranks.are_alive, log.read_text()
            time.sleep(0.01)
        ranks.hold()
        time.sleep(6.0)
        ranks.let_go()
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    assert not (output / "stalls").exists()
    assert not (output / "heartbeats").exists()
    assert max(steps_of(output)) == 12


@pytest.mark.ci
def test_a_rank_that_is_slow_within_its_own_limit_is_let_be(tiny_base: Path, tmp_path: Path) -> None:
    """The others are over theirs, and see that it lives and may take its time."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "run", tmp_path / "log"
    limits = ["train.max_steps=12", "watchdog.step_s=3", "watchdog.data_s=60"]
    with Ranks(2, ["train", str(config), f"output_dir={output}", *limits], log, before=slow_data) as ranks:
        assert ranks.exit_codes(PATIENCE_S) == [0, 0], log.read_text()
    assert not (output / "stalls").exists()


def slow_data(rank: int) -> None:
    """One micro-batch of one rank takes long."""
    if rank == GUILTY:
        import sft_dist.data.loader

        calls = 0

        def late(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            time.sleep(16.0 if calls == 8 else 0.0)
            return collate(*arguments, **keywords)

        sft_dist.data.loader.collate = late
