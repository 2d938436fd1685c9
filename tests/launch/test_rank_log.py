"""Each rank's log: what it has, what the screen has, and that nothing is left over."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.pool import free_port
from tests.launch.conftest import Launch, command_line

TWO = ("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml")
TALKS = """
import ctypes, time, sys
sys.stdout.write(f"python {rank}\\n")
ctypes.CDLL(None).write(1, b"libc %d\\n" % rank, 7)
os.system(f"echo child {rank} >&2")
"""


def logs_of(folder: Path) -> dict[str, list[str]]:
    (attempt,) = (folder / "runs/x/logs").iterdir()
    return {file.name: file.read_text().splitlines() for file in attempt.iterdir()}


def test_all_that_a_rank_prints(launch: Launch, tmp_path: Path) -> None:
    finished = launch(*TWO, in_each_process=TALKS)
    assert finished.returncode == 0, finished.stderr
    logs = logs_of(tmp_path)
    assert sorted(logs) == ["rank-0.log", "rank-1.log"]
    for rank in (0, 1):
        heading, *printed = logs[f"rank-{rank}.log"]
        assert re.fullmatch(rf"--- .* UTC: rank {rank} of 2, local rank {rank} on \S+, process \d+", heading)
        assert sorted(printed) == [f"child {rank}", f"libc {rank}", f"python {rank}"]
    _starting, said, *shown = finished.stdout.splitlines()
    assert said.startswith("logs      runs/x/logs/")
    assert said.endswith("/rank-0.log to rank-1.log")
    assert sorted(shown) == ["libc 0", "python 0"]
    assert finished.stderr == "child 0\n"


@pytest.mark.ci
def test_errors_of_another_rank_are_shown_and_kept(launch: Launch, tmp_path: Path) -> None:
    failing = "import time\nif rank == 1: raise ValueError('a defect')\ntime.sleep(60)"
    finished = launch(*TWO, in_each_process=failing)
    assert finished.returncode == 1
    for text in (finished.stderr, "\n".join(logs_of(tmp_path)["rank-1.log"])):
        assert "[rank 1] ValueError: a defect" in text
        assert "[rank 1] Traceback" in text


@pytest.mark.ci
def test_the_stack_of_a_crash(launch: Launch, tmp_path: Path) -> None:
    finished = launch(*TWO, in_each_process="import time\nos.kill(os.getpid(), 11) if rank == 1 else time.sleep(60)")
    assert finished.returncode == 128 + 11
    assert "rank 1 was ended by SIGSEGV" in finished.stderr
    log = "\n".join(logs_of(tmp_path)["rank-1.log"])
    assert "Fatal Python error: Segmentation fault" in log
    assert "in run_training" in log


@pytest.mark.ci
def test_a_folder_that_cannot_be_written_ends_nothing(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/logs").touch()
    finished = launch(*TWO, in_each_process=TALKS)
    assert finished.returncode == 0
    assert finished.stderr.count("warning: what the ranks print is not kept in runs/x/logs/") == 1
    assert sorted(line for line in finished.stdout.splitlines() if "python" in line) == ["python 0", "python 1"]


def test_a_terminal_stays_one(environment: dict[str, str], tmp_path: Path) -> None:
    statement = "sys.stdout.write(f'{rank} {sys.stdout.isatty()}\\n'); sys.stderr.write(f'warned {rank}\\n')"
    ours, theirs = pty.openpty()
    launcher = subprocess.Popen(
        command_line(*TWO), cwd=tmp_path, env=environment | {"IN_EACH_PROCESS": statement},
        stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # all of the terminal's users have gone
                break
        assert launcher.wait(60) == 0, shown
    finally:
        launcher.kill()
        os.close(ours)
    lines = shown.decode().splitlines()
    assert "0 True" in lines
    assert "warned 0" in lines
    assert not any("1 False" in line or "warned 1" in line for line in lines)
    logs = logs_of(tmp_path)
    assert logs["rank-0.log"][1:] == ["--- stdout is a terminal and not kept; what follows is stderr", "warned 0"]
    assert logs["rank-1.log"][1:] == ["1 False", "warned 1"]


@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGKILL, marks=pytest.mark.ci), signal.SIGTERM],
    ids=lambda number: number.name,
)
def test_the_copy_ends_with_the_rank_and_not_before(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    """As SLURM does it, all processes get the signal; what rank 0 then prints is shown, and nobody is left over."""
    statement = (
        "import signal, time\n"
        "def last(*_): sys.stdout.write('the last line\\n'); sys.stdout.flush(); os._exit(75)\n"
        "signal.signal(signal.SIGTERM, last)\n"
        "open(f'ready{rank}', 'w').close(); time.sleep(60)"
    )
    launcher = subprocess.Popen(
        command_line(*TWO), cwd=tmp_path, env=environment | {"IN_EACH_PROCESS": statement}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    all_of_them: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 100
        while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.05)
        all_of_them = psutil.Process(launcher.pid).children(recursive=True)
        copies = [process for process in all_of_them if process.name() in ("tee", "sh")]
        assert len(copies) == 2  # stdout and stderr lead to different places here
        for process in all_of_them:
            if process not in copies or number != signal.SIGKILL:
                process.send_signal(number)
        out, _ = launcher.communicate(timeout=60)
        _, alive = psutil.wait_procs(all_of_them, timeout=10)
        assert alive == []
    finally:
        for process in [launcher, *all_of_them]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    if number == signal.SIGTERM:
        assert "the last line" in out
        assert "the last line" in logs_of(tmp_path)["rank-0.log"]


@pytest.mark.ci
def test_nodes_share_a_folder_as_soon_as_they_have_met(environment: dict[str, str], tmp_path: Path) -> None:
    """Without SLURM an attempt is called by the time at which a node's launcher started: here seconds apart."""
    statement = (
        "from sft_dist.runtime.process_group import join; from sft_dist.runtime.rank_log import settle\n"
        "from sft_dist.runtime.world import World\n"
        "sys.stdout.write('before\\n'); w = World.from_environment(); settle(join(w), w); sys.stdout.write('after\\n')"
    )
    meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    nodes = []
    try:
        for _ in range(2):
            nodes.append(
                subprocess.Popen(
                    command_line("torchrun.sh", *meeting, "--nproc-per-node", "1", "train", "run.yaml"),
                    cwd=tmp_path, env=environment | {"IN_EACH_PROCESS": statement},
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )
            )  # fmt: skip
            time.sleep(1.1)
        answers = [node.communicate(timeout=120)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], answers
    logs = logs_of(tmp_path)
    assert {name: lines[1:] for name, lines in logs.items()} == {
        "rank-0.log": ["before", "after"],
        "rank-1.log": ["before", "after"],
    }
