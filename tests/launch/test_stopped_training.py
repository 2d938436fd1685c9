"""Real trainings under the launchers: stopped by a signal and resumed, killed and started again by the launcher."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_kill import run_to_the_end, steps_of, write_config
from tests.helpers.pool import free_port
from tests.launch.conftest import NAMES, PREFIXES, REPOSITORY, command_line
from tests.launch.test_signals import LAUNCHERS

BIN = Path(sys.executable).parent
PATIENCE_S = 120
SHORTER = "train.max_steps=24"
WEIGHTS = "final/adapter_model.safetensors"


@contextmanager
def launched(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A launch; it is gone when the context ends, and so is all that it started."""
    clean = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(PREFIXES)}
    changed = {
        "PATH": f"{BIN}{os.pathsep}{clean['PATH']}", "OMP_NUM_THREADS": "1", "VIRTUAL_ENV": sys.prefix,
        "HF_HOME": str(log.parent / "hf"),
    }  # fmt: skip
    with log.open("w") as file:
        process = subprocess.Popen(
            command_line(*arguments), cwd=REPOSITORY, env=clean | changed, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        if process.poll() is None:  # else it has waited for those that it started
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            process.wait()


def trainers(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train, by rank: their parents have none."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    ranks = {p: _rank(p) for p in [psutil.Process(launcher.pid), *below]}
    found = {int(rank): p for p, rank in ranks.items() if rank is not None and ranks[p.parent()] is None}
    return [found[rank] for rank in sorted(found)]


def _rank(process: psutil.Process) -> str | None:
    """None as well for one that has ended since it was listed: compilers and probes come and go below a trainer."""
    try:
        return process.environ().get("RANK")
    except psutil.NoSuchProcess:
        return None


def trainers_below(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Of a launcher whose ranks need not begin with 0."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    ranked = {p.pid for p in below if _rank(p) is not None}
    return [p for p in below if p.pid in ranked and p.ppid() not in ranked]


def wait_for_step(step: int, output: Path, launcher: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while max(steps_of(output), default=0) < step:
        assert launcher.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def figures_of(output: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines]


@pytest.mark.parametrize(
    ("options", "kills"),
    [
        pytest.param([*LAUNCHERS["torchrun"], "--max-restarts", "2"], 1, marks=pytest.mark.ci),
        pytest.param([*LAUNCHERS["torchrun"], "--max-restarts", "2"], 2, marks=pytest.mark.full),
        pytest.param([*LAUNCHERS["accelerate"], "--max_restarts", "1"], 1, marks=pytest.mark.full),
    ],
    ids=["torchrun", "torchrun twice", "accelerate"],
)
def test_a_killed_rank_is_started_again_and_goes_on(tiny_base: Path, tmp_path: Path, options: list[str], kills: int) -> None:  # fmt: skip
    """``--resume never``, the default: the run directory is this launch's own."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "killed", tmp_path / "log"
    with launched([*options, "train", str(config), f"output_dir={output}", SHORTER], log) as launcher:
        for number in range(kills):
            first = max(steps_of(output), default=0)
            wait_for_step(first + 5, output, launcher, log)
            trainers(launcher)[1 - number].kill()
        assert launcher.wait(PATIENCE_S) == 0, log.read_text()
    text = log.read_text()
    for number in range(kills):
        assert f"rank {1 - number} was ended by SIGKILL: starting all again, restart {number + 1} of " in text
        assert f"restart {number + 1}: going on from the newest checkpoint, as with --resume auto" in text
    assert text.count("resumed   ") == kills
    whole = run_to_the_end(config, tmp_path / "whole", SHORTER)
    assert figures_of(output) == whole
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.ci
def test_a_rank_that_is_killed_on_the_second_node(tiny_base: Path, tmp_path: Path) -> None:
    """Two launchers that meet as two nodes do: all ranks start again and go on from the newest checkpoint."""
    config, output = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "killed"
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    node = ["torchrun.sh", *meeting, "--nproc-per-node", "1", "--max-restarts", "1", "train", str(config)]
    with (
        launched([*node, f"output_dir={output}", SHORTER], tmp_path / "log-0") as first,
        launched([*node, f"output_dir={output}", SHORTER], tmp_path / "log-1") as second,
    ):
        wait_for_step(5, output, first, tmp_path / "log-0")
        # Either may have become the second node.
        found = {int(p.environ()["RANK"]): p for launcher in (first, second) for p in trainers_below(launcher)}
        found[1].kill()
        assert [each.wait(PATIENCE_S) for each in (first, second)] == [0, 0], said(tmp_path)
    text = said(tmp_path)
    assert "rank 1 was ended by SIGKILL: starting all again, restart 1 of 1" in text
    assert "restart 1: going on from the newest checkpoint, as with --resume auto" in text
    assert text.count("resumed   ") == 1
    (attempt,) = (output / "logs").iterdir()
    for rank in (0, 1):
        headings = [line for line in (attempt / f"rank-{rank}.log").read_text().splitlines() if line[:4] == "--- "]
        assert [", restart 1" in heading for heading in headings] == [False, True]
    assert figures_of(output) == run_to_the_end(config, tmp_path / "whole", SHORTER)


def said(folder: Path) -> str:
    return "".join((folder / f"log-{node}").read_text() for node in (0, 1))


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        pytest.param("torchrun", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("accelerate", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("deepspeed", signal.SIGINT, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_stopped_through_the_launcher(tiny_base: Path, tmp_path: Path, launcher: str, number: signal.Signals) -> None:
    config, output, log = write_config(tiny_base, tmp_path, "fsdp2", "lora"), tmp_path / "stopped", tmp_path / "log"
    with launched([*LAUNCHERS[launcher], "train", str(config), f"output_dir={output}", SHORTER], log) as process:
        wait_for_step(5, output, process, log)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 75, log.read_text()
    assert log.read_text().count(f"preempted by {number.name} at step {max(steps_of(output))}: saved ") == 1
    assert "Traceback" not in log.read_text()
    whole = run_to_the_end(config, tmp_path / "whole", SHORTER)
    assert run_to_the_end(config, output, "--resume", "auto", SHORTER) == whole


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_one_rank_under_a_launcher_that_the_user_calls(tiny_base: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Torchrun itself returns 1 for any failure, but nothing is lost: also with SIGUSR1, which it is told to handle."""
    config, output, log = write_config(tiny_base, tmp_path, "ddp", "lora"), tmp_path / "stopped", tmp_path / "log"
    signals = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    torchrun = [str(BIN / "torchrun"), "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", signals]
    with launched([*torchrun, "launch/train.py", str(config), f"output_dir={output}", SHORTER], log) as process:
        wait_for_step(5, output, process, log)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 1, log.read_text()
    step = max(steps_of(output))
    assert f"preempted by {number.name} at step {step}: saved {output}/checkpoints/step-{step:08d}" in log.read_text()
