"""Starts the launchers' scripts as a user does, with the trainer replaced in the processes.

So these tests take as long as the launchers themselves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import sft_dist

REPOSITORY = Path(sft_dist.__file__).parents[1]

SMALLEST = """\
model: {path: m}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""

# Python imports sitecustomize when it starts. The statement given as $IN_EACH_PROCESS runs in place of training; the one
# in $IN_PLACE_OF_THE_COMMAND runs in every process that has a rank, before it looks at its arguments.
SITECUSTOMIZE = r"""
import os, sys, types

SCREEN = os.dup(1)  # what a rank prints goes to its log later

def print(*values):
    # In one piece: launchers start Python unbuffered, and then the built-in's words mingle with another process's.
    os.write(SCREEN, (" ".join(map(str, values)) + "\n").encode())

def run_training(config, asked):
    resume, allowed, rehearsing = asked.resume, asked.allowed, asked.rehearsing
    rank = int(os.environ.get("RANK", "0"))
    exec(os.environ["IN_EACH_PROCESS"])

module = types.ModuleType("sft_dist.train.run")
module.run_training = run_training
sys.modules["sft_dist.train.run"] = module

if "RANK" in os.environ and os.environ.get("IN_PLACE_OF_THE_COMMAND"):
    exec(os.environ["IN_PLACE_OF_THE_COMMAND"])
    sys.stdout.flush()
    os._exit(0)
"""

# What a launcher may leave in the environment of what it starts.
PREFIXES = ("PET_", "ACCELERATE_", "FSDP_", "DS_", "DEEPSPEED_", "SFT_DIST_", "TORCHELASTIC_")
NAMES = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
) | {"OMP_NUM_THREADS"}

Finished = subprocess.CompletedProcess[str]
Launch = Callable[..., Finished]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(SMALLEST, encoding="utf-8")
    (tmp_path / "a.jsonl").touch()
    inherited = {k: v for k, v in os.environ.items() if k not in NAMES and not k.startswith(PREFIXES)}
    # As if the environment of these tests were active, so that the script takes this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # An empty home: the user's own default configuration of Accelerate does not count here.
    changed = {"PYTHONPATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix, "PATH": path, "HF_HOME": str(tmp_path / "hf")}
    return inherited | changed


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Launch:
    """``launch(program, *arguments, in_each_process=...)``; a program that ends in ``.sh`` is one of launch/."""

    def run(*arguments: str, in_each_process: str = "", in_place_of_the_command: str = "") -> Finished:
        return subprocess.run(
            command_line(*arguments),
            cwd=tmp_path,
            env=environment | {"IN_EACH_PROCESS": in_each_process, "IN_PLACE_OF_THE_COMMAND": in_place_of_the_command},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def without_logs_line(out: str) -> list[str]:
    """Lines of a launch of several processes, of which rank 0 says once where the logs are."""
    lines = out.splitlines()
    (said,) = [line for line in lines if line.startswith("logs      runs/x/logs/")]
    lines.remove(said)
    return lines


def command_line(program: str, *arguments: str) -> list[str]:
    return [str(REPOSITORY / "launch" / program) if program.endswith(".sh") else program, *arguments]


InterruptedCode = Callable[..., int]


@pytest.fixture
def code_after_a_signal(environment: dict[str, str], tmp_path: Path) -> InterruptedCode:
    """Starts two processes that wait, sends a signal to the launcher alone; no process may outlive it."""

    def run(*arguments: str, number: signal.Signals, processes: int = 2) -> int:
        waiting = "import pathlib, time; pathlib.Path(f'pid{rank}').write_text(str(os.getpid())); time.sleep(60)"
        launcher = subprocess.Popen(
            command_line(*arguments),
            cwd=tmp_path,
            env=environment | {"IN_EACH_PROCESS": waiting},
            stderr=subprocess.DEVNULL,
        )
        files = [tmp_path / f"pid{rank}" for rank in range(processes)]
        try:
            deadline = time.monotonic() + 60
            while not all(file.exists() and file.read_text() for file in files):
                assert time.monotonic() < deadline
                assert launcher.poll() is None, "it ended by itself"
                time.sleep(0.05)
            launcher.send_signal(number)
            code = launcher.wait(timeout=60)
        finally:
            launcher.kill()
            launcher.wait()
        for file in files:
            with pytest.raises(ProcessLookupError):
                os.kill(int(file.read_text()), 0)
        return code

    return run
