"""Where the nodes of a step meet, and what is said when they cannot; SLURM's variables are set as it sets them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError, MachineError
from sft_dist.launch import meeting as meetings
from sft_dist.launch.meeting import await_first_node, choose_network, claim_port, meeting_of, step_of_launcher
from sft_dist.runtime.network import free_port, interface_of
from sft_dist.runtime.slurm_step import Step, step_from_environment
from tests.launch.conftest import REPOSITORY, command_line
from tests.unit.test_slurm_step import BATCH_SHELL, TASK

PROGRAM = "launch/torchrun.sh"


def place(rank: int, *hosts: str) -> Step:
    return Step(7, 0, hosts, rank, (1,) * len(hosts), 0, 0)


def test_one_task_a_node(capsys: pytest.CaptureFixture[str]) -> None:
    alone = TASK | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    assert step_of_launcher(PROGRAM, alone) == step_from_environment(alone)
    assert step_of_launcher(PROGRAM, {}) is None
    assert step_of_launcher(PROGRAM, BATCH_SHELL | {"SLURM_JOB_NUM_NODES": "1"}) is None
    with pytest.raises(ConfigError, match="started on one node alone, and the job has 2") as error:
        step_of_launcher(PROGRAM, BATCH_SHELL)
    assert "srun --ntasks-per-node=1 launch/torchrun.sh" in error.value.fix
    first = TASK | {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    with pytest.raises(ConfigError, match="started 2 times on this node") as error:
        step_of_launcher(PROGRAM, first)
    assert "srun --ntasks=2 --ntasks-per-node=1" in error.value.fix
    with pytest.raises(SystemExit) as ended:  # one tells
        step_of_launcher(PROGRAM, TASK)
    assert (ended.value.code, capsys.readouterr().err) == (2, "")


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    with pytest.raises(MachineError, match=r"finds no way to the node nowhere\.invalid: ") as error:
        meeting_of(place(1, "nowhere.invalid", "localhost"), program=PROGRAM, env={})
    assert "MASTER_ADDR" in error.value.fix
    with pytest.raises(MachineError, match=r"nowhere\.invalid"):
        meeting_of(place(0, socket.gethostname(), "nowhere.invalid"), program=PROGRAM, env={})
    # As where /etc/hosts of a node lists the others on its own loopback.
    with pytest.raises(MachineError, match=r"the name of the node localhost stands for 127\.0\.0\.1"):
        meeting_of(place(1, "localhost", "n2"), program=PROGRAM, env={})
    assert time.monotonic() - started < 20
    here = meeting_of(place(0, "localhost"), program=PROGRAM, env={"MASTER_PORT": "29999"})
    assert (here.endpoint, here.own_address) == ("localhost:29999", "127.0.0.1")
    with pytest.raises(ConfigError, match="MASTER_PORT is '70000'"):
        meeting_of(place(0, "localhost"), program=PROGRAM, env={"MASTER_PORT": "70000"})


def test_the_interface_is_told_once_and_stays_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (meetings.GLOO_INTERFACE, meetings.NCCL_INTERFACE):
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(MachineError, match=r"192\.0\.2\.1"):
        interface_of("192.0.2.1")
    meeting = meetings.Meeting(PROGRAM, place(0, "a", "b"), "a", 29999, "127.0.0.1")
    choose_network(meeting)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    choose_network(meeting)
    assert capsys.readouterr().out.splitlines() == [
        "2 nodes, a to b: meeting at a:29999 over lo",
        "2 nodes, a to b: meeting at a:29999 over ib0 and lo",
    ]
    choose_network(meetings.Meeting(PROGRAM, place(1, "a", "b"), "a", 29999, "127.0.0.1"))
    assert capsys.readouterr().out == ""


def test_a_port_in_use_and_a_first_node_that_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        for rank in (0, 1):
            meeting = meetings.Meeting(PROGRAM, place(rank, "localhost", "b"), "localhost", port, "127.0.0.1")
            await_first_node(meeting)
            if rank == 0:
                with pytest.raises(MachineError, match=f"launch/torchrun.sh: port {port} of localhost is in use"):
                    claim_port(meeting)
            else:
                claim_port(meeting)
    monkeypatch.setenv("SFT_DIST_MEETING_S", "1")
    silent = meetings.Meeting(PROGRAM, place(1, "localhost", "b"), "localhost", free_port(), "127.0.0.1")
    with pytest.raises(MachineError, match=r"first node, localhost, did not answer on port \d+ within 1 s"):
        await_first_node(silent)
    monkeypatch.setenv("SFT_DIST_MEETING_S", "soon")
    with pytest.raises(ConfigError, match="SFT_DIST_MEETING_S is 'soon'"):
        await_first_node(silent)


def srun_script(environment: dict[str, str], folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command_line("srun.sh", *command), cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


TWO_TASKS = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NNODES": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
}


def test_plain_srun_says_what_it_needs(environment: dict[str, str], tmp_path: Path) -> None:
    outside = srun_script(environment, tmp_path, "train", "run.yaml")
    assert (outside.returncode, outside.stdout) == (2, "")
    assert outside.stderr.startswith("error: launch/srun.sh was not started by srun\n  fix: srun --ntasks-per-node=N ")
    uneven = environment | TWO_TASKS | {
        "SLURM_STEP_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_LOCALID": "0", "SLURM_PROCID": "0",
    }  # fmt: skip
    told = srun_script(uneven, tmp_path, "train", "run.yaml")
    assert told.returncode == 2
    assert told.stderr.startswith("error: launch/srun.sh: the nodes have different numbers of tasks (a: 2, b: 1)\n")
    other = srun_script(uneven | {"SLURM_NODEID": "1", "SLURM_PROCID": "2"}, tmp_path, "train", "run.yaml")
    assert (other.returncode, other.stderr) == (2, "")
    first = environment | TWO_TASKS | {"SLURM_LOCALID": "0", "SLURM_PROCID": "0"}
    bound = srun_script(first | {"CUDA_VISIBLE_DEVICES": "0"}, tmp_path, "train", "run.yaml")
    assert bound.returncode == 2
    assert "may use the GPUs 0 only" in bound.stderr


def test_tasks_are_the_processes(environment: dict[str, str], tmp_path: Path) -> None:
    """Two tasks as srun starts them, with the trainer replaced; both fail for one reason, which is told once."""
    statement = (
        "print(*map(os.environ.get, ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')))\n"
        "from sft_dist.errors import DataError; raise DataError('a.jsonl: row 3', fix='mend it')"
    )
    notes = tmp_path / "notes"
    tasks = [
        subprocess.Popen(
            command_line("srun.sh", "train", "run.yaml"),
            cwd=tmp_path,
            env=environment | TWO_TASKS | {
                "SLURM_LOCALID": task, "SLURM_PROCID": task, "IN_EACH_PROCESS": statement, "TMPDIR": str(tmp_path),
                "SFT_DIST_JOB_NOTES": str(notes), "MASTER_PORT": str(free_port()),
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for task in ("0", "1")
    ]  # fmt: skip
    try:
        answers = [task.communicate(timeout=120) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [4, 4], answers
    assert "".join(errors for _, errors in answers) == "error: a.jsonl: row 3\n  fix: mend it\n"
    lines = [line for out, _ in answers for line in out.splitlines() if line[0].isdigit()]
    assert sorted(lines) == ["0 0 2 2 localhost", "1 1 2 2 localhost"]
    assert "starting 2 processes on each node, by srun" in answers[0][0]
    assert {file.name: file.read_text() for file in notes.glob("exit-*")} == {"exit-0.0": "4", "exit-0.1": "4"}
    assert list(tmp_path.glob("sft_dist_launch_*")) == []
    logs = sorted((tmp_path / "runs/x/logs/9-0").iterdir())
    assert [log.name for log in logs] == ["rank-0.log", "rank-1.log"]


@pytest.mark.ci
def test_processes_that_meet_by_themselves_do_not_wait_for_ever(environment: dict[str, str], tmp_path: Path) -> None:
    """As under plain srun and DeepSpeed, where no launcher keeps the store: rank 0 of another node never comes."""
    (tmp_path / "sitecustomize.py").unlink()
    lonely = {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "SFT_DIST_LAUNCHER": "launch/srun.sh", "SFT_DIST_MEETING_S": "1",
        "PYTHONPATH": str(REPOSITORY),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sft_dist", "train", "run.yaml"],
        cwd=tmp_path, env=environment | lonely, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert done.stderr.startswith("error: launch/srun.sh: the first node, 127.0.0.1, did not answer on port ")
    assert len(done.stderr.splitlines()) == 2


def test_a_package_or_a_program_that_is_missing(environment: dict[str, str], tmp_path: Path) -> None:
    bare = {key: value for key, value in environment.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    without = subprocess.run(
        [sys.executable, "-S", "-m", "sft_dist.launch", "deepspeed", "train", "run.yaml"],
        cwd=REPOSITORY, env=bare, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert without.returncode == 2
    assert without.stderr.startswith("error: launch/deepspeed.sh: ")
    assert " has no package psutil\n  fix: activate the environment " in without.stderr
    (tmp_path / "bin").mkdir()
    for tool in ("dirname", "sh"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    script = subprocess.run(
        command_line("torchrun.sh", "train", "run.yaml"),
        cwd=tmp_path, env={"PATH": str(tmp_path / "bin"), "VIRTUAL_ENV": "/none"}, capture_output=True, text=True,
    )  # fmt: skip
    assert (script.returncode, script.stdout) == (2, "")
    assert script.stderr.startswith("error: launch/torchrun.sh: there is no program python\n  fix: ")
