"""Signals to the launchers, and what they start again; the trainer is replaced where the launcher is what is tested."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.pool import free_port
from tests.launch.conftest import Launch, command_line

LAUNCHERS = {
    "torchrun": ("torchrun.sh", "--nproc-per-node", "2"),
    "accelerate": ("accelerate.sh", "--num_processes", "2"),
    "deepspeed": ("deepspeed.sh", "--num_gpus", "2"),
}
TWO = LAUNCHERS["torchrun"]

# As the loop does, without a model: rank 0 has still to do when the other one leaves.
STOPPABLE = """
import pathlib, time
from sft_dist.errors import Preempted
from sft_dist.runtime.signals import Signals
with Signals(is_main=rank == 0) as signals, signals.while_training():
    pathlib.Path(f"pid{rank}").write_text(str(os.getpid()))
    while not signals.noted:
        time.sleep(0.01)
    noted = signals.noted
    time.sleep(SECONDS - rank)
    pathlib.Path(f"saved{rank}").write_text(str(noted))
    raise Preempted("preempted", fix="go on")
"""

Stop = Callable[..., tuple[int, str, str]]


@pytest.fixture
def stop(environment: dict[str, str], tmp_path: Path) -> Stop:
    """``stop(*arguments, sending=..., seconds=...)``: exit code, output and errors of a launch that gets a signal.

    Args of the function:
        sending: called with the launcher when all processes train.
        seconds: that rank 0 takes to save.
    """

    def run(*arguments: str, sending: Callable[[subprocess.Popen[str]], None], seconds: float, processes: int = 2) -> tuple[int, str, str]:  # fmt: skip
        launcher = subprocess.Popen(
            command_line(*arguments), cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment | {"IN_EACH_PROCESS": STOPPABLE.replace("SECONDS", str(seconds))}, start_new_session=True,
        )  # fmt: skip
        files = [tmp_path / f"pid{rank}" for rank in range(processes)]
        try:
            deadline = time.monotonic() + 60
            while not all(file.exists() and file.read_text() for file in files):
                assert time.monotonic() < deadline
                assert launcher.poll() is None, launcher.communicate()
                time.sleep(0.05)
            sending(launcher)
            out, errors = launcher.communicate(timeout=seconds + 60)
        finally:
            for pid in [launcher.pid, *(int(file.read_text()) for file in files if file.exists())]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launcher.wait()
        return launcher.returncode, out, errors

    return run


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("torchrun", signal.SIGTERM),
        pytest.param("torchrun", signal.SIGUSR1, marks=pytest.mark.ci),
        pytest.param("torchrun", signal.SIGINT, marks=pytest.mark.full),
        pytest.param("accelerate", signal.SIGUSR1, marks=pytest.mark.full),
        pytest.param("accelerate", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("accelerate", signal.SIGINT, marks=pytest.mark.full),
        pytest.param("deepspeed", signal.SIGUSR1, marks=pytest.mark.ci),
        pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("deepspeed", signal.SIGINT, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_a_signal_to_the_launcher_saves_and_ends_with_75(
    stop: Stop, tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    code, _, errors = stop(
        *LAUNCHERS[launcher], "train", "run.yaml", sending=lambda p: p.send_signal(number), seconds=2
    )
    assert code == 75, errors
    assert [(tmp_path / f"saved{rank}").read_text() for rank in (0, 1)] == [str(number.value)] * 2
    assert errors.count("preempted; go on\n") == 1
    assert "Error" not in errors


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.full)])
def test_ctrl_c_reaches_the_whole_group(stop: Stop, tmp_path: Path, launcher: str) -> None:
    """As from a terminal: the launcher and what is in its process group get it at once, copies follow."""
    code, _, errors = stop(
        *(*LAUNCHERS[launcher], "train", "run.yaml"), sending=lambda p: os.killpg(p.pid, signal.SIGINT), seconds=2
    )
    assert (code, errors.count("press Ctrl-C again"), errors.count("preempted; go on\n")) == (75, 1, 1), errors


@pytest.mark.parametrize(
    "arguments",
    [pytest.param(TWO, marks=pytest.mark.ci), pytest.param(LAUNCHERS["deepspeed"], marks=pytest.mark.full), pytest.param(("accelerate.sh",), marks=pytest.mark.full)],
    ids=lambda arguments: arguments[0],
)  # fmt: skip
def test_a_second_ctrl_c_leaves(stop: Stop, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    def twice(launcher: subprocess.Popen[str]) -> None:
        launcher.send_signal(signal.SIGINT)
        time.sleep(1.2)
        launcher.send_signal(signal.SIGINT)

    processes = 1 if arguments == ("accelerate.sh",) else 2
    code, _, errors = stop(*arguments, "train", "run.yaml", sending=twice, seconds=60, processes=processes)
    assert (code, errors.count("interrupted: ")) == (130, 1), errors
    assert not (tmp_path / "saved0").exists()


@pytest.mark.full
@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_saving_takes_as_long_as_it_takes(stop: Stop, tmp_path: Path, launcher: str) -> None:
    """Left alone, torchrun and deepspeed end their processes 30 s after the signal."""
    sent: list[float] = []

    def send(process: subprocess.Popen[str]) -> None:
        process.send_signal(signal.SIGTERM)
        sent.append(time.monotonic())

    code, _, errors = stop(*LAUNCHERS[launcher], "train", "run.yaml", sending=send, seconds=40)
    assert code == 75, errors
    assert time.monotonic() - sent[0] > 40


STARTS = "import pathlib, time; n = int(os.environ['TORCHELASTIC_RESTART_COUNT']); print('start', n, 'of', rank)\n"


@pytest.mark.ci
@pytest.mark.parametrize(
    ("failing", "code"),
    [
        ("sys.exit(75)", 75),
        ("from sft_dist.errors import CheckpointError; raise CheckpointError('step-2 is damaged', fix='mend it')", 5),
    ],
    ids=["preempted", "named"],
)
def test_what_would_happen_again_is_not_started_again(launch: Launch, failing: str, code: int) -> None:
    statement = STARTS + f"time.sleep(60) if rank == 0 and {code} != 75 else None\n{failing}"
    finished = launch(*TWO, "--max-restarts", "2", "train", "run.yaml", in_each_process=statement)
    assert finished.returncode == code
    assert sorted(line for line in finished.stdout.splitlines() if "of" in line) == ["start 0 of 0", "start 0 of 1"]


@pytest.mark.ci
def test_a_peer_that_fails_first_does_not_hide_a_named_failure(launch: Launch) -> None:
    """Rank 0 is the first that the launcher sees; rank 1, the cause, says so a moment later."""
    statement = STARTS + (
        "if rank == 0: os._exit(1)\n"
        "from sft_dist.errors import TrainingDiverged\n"
        "time.sleep(1); raise TrainingDiverged('loss is nan', fix='lower optim.lr')"
    )
    finished = launch(*TWO, "--max-restarts", "2", "train", "run.yaml", in_each_process=statement)
    assert (finished.returncode, finished.stdout.count("start")) == (6, 3)  # and "starting 2 processes"


@pytest.mark.parametrize(
    "script",
    [pytest.param(TWO, marks=pytest.mark.ci), pytest.param(LAUNCHERS["accelerate"], marks=pytest.mark.full)],
    ids=lambda s: s[0],
)
def test_a_killed_process_is_started_again(launch: Launch, script: tuple[str, ...]) -> None:
    option = "--max-restarts" if script == TWO else "--max_restarts"
    statement = STARTS + "os.kill(os.getpid(), 9) if rank == 1 and n < 2 else time.sleep(0.5 if n == 2 else 60)"
    finished = launch(*script, option, "2", "train", "run.yaml", in_each_process=statement)
    assert finished.returncode == 0
    assert finished.stderr.splitlines() == [
        f"rank 1 was ended by SIGKILL: starting all again, restart {n} of 2" for n in (1, 2)
    ]
    starts = [line for line in finished.stdout.splitlines() if line.startswith("start ")]
    assert sorted(starts) == [f"start {n} of {rank}" for n in (0, 1, 2) for rank in (0, 1)]


@pytest.mark.full
def test_no_restart_after_a_signal_to_the_launcher(stop: Stop, tmp_path: Path) -> None:
    """Another process that fails while it saves does not start the run anew, which was told to stop."""

    def send(launcher: subprocess.Popen[str]) -> None:
        launcher.send_signal(signal.SIGTERM)
        os.kill(int((tmp_path / "pid0").read_text()), signal.SIGKILL)

    code, out, _ = stop(*TWO, "--max-restarts", "3", "train", "run.yaml", sending=send, seconds=60)
    assert code == 137
    assert "restart" not in out


@pytest.mark.full
def test_nodes_start_again_together(environment: dict[str, str], tmp_path: Path) -> None:
    """The launcher of the other node, whose process has not failed, counts no restart; its process knows of it."""
    meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    statement = (
        "import time; from sft_dist.runtime.world import attempt_name, restarts\n"
        "print(rank, restarts(), attempt_name())\n"
        "time.sleep(2); os.kill(os.getpid(), 9) if rank == 0 and not restarts() else time.sleep(60 * (not restarts()))"
    )
    nodes = [
        subprocess.Popen(
            command_line("torchrun.sh", *meeting, "--nproc-per-node", "1", "--max-restarts", "1", "train", "run.yaml"),
            cwd=tmp_path, env=environment | {"IN_EACH_PROCESS": statement},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        answers = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], answers
    lines = [line.split() for out, _ in answers for line in out.splitlines() if line[0].isdigit()]
    assert sorted(line[:2] for line in lines) == [["0", "0"], ["0", "1"], ["1", "0"], ["1", "1"]]
    names = {count: {line[2] for line in lines if line[1] == count} for count in "01"}
    assert [len(names[count]) for count in "01"] == [1, 1]
    assert names["0"] != names["1"]
