"""launch/torchrun.sh with real processes: what they inherit, and what reaches the shell when one of them fails.

The trainer is replaced in the processes, so that these tests take as long as torchrun itself.
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
from sft_dist.runtime.torchrun import exit_code, main

REPOSITORY = Path(sft_dist.__file__).parents[1]

SMALLEST = """\
model: {path: m}
data: {train: [{path: a.jsonl}]}
train: {global_batch_size: 2, max_steps: 3}
output_dir: runs/x
"""

# Python imports sitecustomize when it starts; the statement given as $IN_EACH_PROCESS runs in place of training.
SITECUSTOMIZE = """\
import os, sys, types

def run_training(config):
    rank = int(os.environ["RANK"])
    exec(os.environ["IN_EACH_PROCESS"])

module = types.ModuleType("sft_dist.train.run")
module.run_training = run_training
sys.modules["sft_dist.train.run"] = module
"""

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(SMALLEST, encoding="utf-8")
    (tmp_path / "a.jsonl").touch()
    chosen = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    inherited = {k: v for k, v in os.environ.items() if k not in chosen and not k.startswith("PET_")}
    # As if the environment of these tests were active, so that the script takes this Python.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return inherited | {"PYTHONPATH": str(tmp_path), "VIRTUAL_ENV": sys.prefix, "PATH": path}


@pytest.fixture
def launch(environment: dict[str, str], tmp_path: Path) -> Launch:
    def run(*arguments: str, in_each_process: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(REPOSITORY / "launch" / "torchrun.sh"), *arguments],
            cwd=tmp_path,
            env=environment | {"IN_EACH_PROCESS": in_each_process},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def test_processes_share_the_cores_and_meet_on_a_free_port(launch: Launch) -> None:
    finished = launch(
        *("--nproc-per-node", "2", "train", "run.yaml", "train.seed=7"),
        in_each_process="print(rank, config.train.seed, *map(os.environ.get, ('WORLD_SIZE', 'OMP_NUM_THREADS', 'MASTER_PORT')))",
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    starting, *printed = finished.stdout.splitlines()
    assert starting == "starting 2 processes on this machine"
    first, second = sorted(line.split() for line in printed)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert (first[:4], second[:4]) == (["0", "7", "2", threads], ["1", "7", "2", threads])
    assert first[4] == second[4] != "29500"


def test_a_configuration_mistake_starts_no_process(launch: Launch) -> None:
    finished = launch(
        "--nproc-per-node", "2", "train", "run.yaml", "train.num_epochs=1", in_each_process="print('started')"
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        "error: run.yaml: train.num_epochs is 1 and train.max_steps is 3: both set the length of the run\n"
        "  fix: remove one of them (as an override: train.num_epochs=null or train.max_steps=null)\n"
    )


def test_a_failure_that_all_processes_share_is_told_once(launch: Launch) -> None:
    finished = launch(
        *("--nproc-per-node", "2", "train", "run.yaml"),
        in_each_process="from sft_dist.errors import DataError; raise DataError('a.jsonl: row 3', fix='mend it')",
    )
    assert finished.returncode == 4
    assert finished.stderr == "error: a.jsonl: row 3\n  fix: mend it\n"


def test_a_mistake_that_one_process_alone_meets_is_told(launch: Launch) -> None:
    finished = launch(
        *("--nproc-per-node", "2", "train", "run.yaml"),
        in_each_process="import time; from sft_dist.errors import ConfigError\n"
        "if rank == 0: time.sleep(60)\n"
        "raise ConfigError('local rank 1 has no GPU', fix='start 1 process')",
    )
    assert finished.returncode == 2
    assert finished.stderr == "error: local rank 1 has no GPU\n  fix: start 1 process\n"


def test_preempted_passes_through(launch: Launch) -> None:
    finished = launch("--nproc-per-node", "2", "train", "run.yaml", in_each_process="sys.exit(75)")
    assert (finished.returncode, finished.stderr) == (75, "")


def test_a_killed_process_is_named(launch: Launch) -> None:
    finished = launch(
        *("--nproc-per-node", "2", "train", "run.yaml"),
        in_each_process="import time; time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)",
    )
    assert finished.returncode == 128 + 9
    assert finished.stderr.splitlines() == [
        "error: rank 1 was ended by SIGKILL, and the run with it",
        "  fix: if nobody sent it, memory ran out: see `dmesg`, then lower train.micro_batch_size or data.max_seq_len",
    ]


def test_a_missing_file_starts_no_process(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").unlink()
    finished = launch("--nproc-per-node", "2", "train", "run.yaml", in_each_process="print('started')")
    assert (finished.returncode, finished.stdout) == (4, "")
    assert finished.stderr.startswith("error: a.jsonl does not exist")


def test_an_unexpected_failure_keeps_the_report_of_torchrun(launch: Launch) -> None:
    finished = launch("train", "run.yaml", in_each_process="raise ValueError('a defect')")
    assert finished.returncode == 1
    assert "ValueError: a defect" in finished.stderr
    assert "failed (exitcode: 1) local_rank: 0" in finished.stderr


def test_usage_errors_are_told_once(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    assert main(["--nproc-per-node", "2", "trian", "run.yaml"]) == 2
    assert capfd.readouterr().err.count("No such command") == 1
    (tmp_path / "run.yaml").write_text(SMALLEST, encoding="utf-8")
    assert main(["--nproc-per-node", "no", "train", str(tmp_path / "run.yaml")]) == 2
    assert capfd.readouterr().err == (
        "error: torchrun's options: Unsupported nproc_per_node value: no\n  fix: see `launch/torchrun.sh --help`\n"
    )


def test_interrupt_ends_every_process(environment: dict[str, str], tmp_path: Path) -> None:
    waiting = "import pathlib, time; pathlib.Path(f'pid{rank}').write_text(str(os.getpid())); time.sleep(60)"
    launcher = subprocess.Popen(
        [str(REPOSITORY / "launch" / "torchrun.sh"), "--nproc-per-node", "2", "train", "run.yaml"],
        cwd=tmp_path,
        env=environment | {"IN_EACH_PROCESS": waiting},
        stderr=subprocess.DEVNULL,
    )
    files = [tmp_path / "pid0", tmp_path / "pid1"]
    try:
        deadline = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline
            assert launcher.poll() is None, "it ended by itself"
            time.sleep(0.05)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=60) == 130
    finally:
        launcher.kill()
        launcher.wait()
    for file in files:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize(
    ("by_rank", "code"),
    [
        ({0: 4, 1: -15}, 4),
        ({0: -15, 1: 5}, 5),
        ({1: 6, 2: 4}, 6),  # the lowest rank speaks
        ({0: 1, 1: 6}, 6),  # rank 0 lost its peer in a collective
        ({0: 75, 1: 75}, 75),
        ({0: 75, 1: -15}, 75),
        ({0: 75, 1: 4}, 4),  # rank 0 was ended because rank 1 failed: do not requeue
        ({0: 75, 1: 1}, 1),
        ({0: 1, 1: -15}, 1),
        ({2: -9, 3: -15}, 137),
        ({0: -15, 1: -15}, 143),
    ],
)
def test_exit_code_of_several_processes(by_rank: dict[int, int], code: int) -> None:
    assert exit_code(by_rank) == code
