"""launch/deepspeed.sh: DeepSpeed's launcher with the exit codes and messages of the others."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from sft_dist.errors import ConfigError
from sft_dist.launch import deepspeed
from tests.launch.conftest import SMALLEST, InterruptedCode, Launch

TWO = ("deepspeed.sh", "--num_gpus", "2")
SHOWN = (
    "print(*map(os.environ.get, ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_SIZE', 'OMP_NUM_THREADS')), "
    "os.environ['MASTER_PORT'] != '29500', *sys.orig_argv[sys.orig_argv.index('sft_dist'):])"
)


def test_processes_and_their_arguments(launch: Launch) -> None:
    command = ["train", "run.yaml", "--resume=auto", "data.train=[{path: a.jsonl}]", "train.seed=7"]
    finished = launch(*TWO, *command, in_place_of_the_command=SHOWN)
    assert (finished.returncode, finished.stderr) == (0, "")
    starting, *printed = finished.stdout.splitlines()  # and none of DeepSpeed's own lines
    assert starting == "starting 2 processes on this machine"
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    expected = [[*r, "2", "2", threads, "True", "sft_dist", *command] for r in ("00", "11")]
    assert sorted(printed) == [" ".join(words) for words in expected]


@pytest.mark.ci
def test_a_machine_of_a_host_file(launch: Launch, tmp_path: Path) -> None:
    """The second of two machines, without ssh: it starts its own processes, and they know the shape of the whole."""
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    place = ("--hostfile", "hosts", "--no_ssh", "--node_rank", "1", "--master_addr", "127.0.0.1")
    statement = "from sft_dist.runtime.world import World; print(World.from_environment())"
    finished = launch("deepspeed.sh", *place, "train", "run.yaml", in_each_process=statement)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.splitlines() == [
        "starting 1 process on this machine",
        "World(rank=1, local_rank=0, shape=WorldShape(num_nodes=2, ranks_per_node=1))",
    ]


def test_the_cause_counts_and_not_the_process_that_lost_its_peer(launch: Launch) -> None:
    """DeepSpeed returns the code of the process that it sees first: here that of rank 0, which ends first."""
    finished = launch(
        *(*TWO, "train", "run.yaml"),
        in_each_process="import time; from sft_dist.errors import TrainingDiverged\n"
        "if rank == 0:\n"
        "    while not os.path.exists('said'): time.sleep(0.01)\n"
        "    os._exit(1)\n"
        "try: raise TrainingDiverged('loss is nan', fix='lower optim.lr')\n"
        "except TrainingDiverged as e:\n"
        "    from sft_dist.runtime.failure import report; report(e, debug=False); open('said', 'w'); time.sleep(60)",
    )
    assert finished.returncode == 6
    assert finished.stderr == "[rank 1] error: loss is nan\n[rank 1]   fix: lower optim.lr\n"


@pytest.mark.ci
def test_a_killed_process_and_a_preempted_one(launch: Launch) -> None:
    killed = launch(
        *(*TWO, "train", "run.yaml"),
        in_each_process="import time; time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)",
    )
    assert killed.returncode == 128 + 9
    assert killed.stderr.startswith("error: a process was ended by SIGKILL, and the run with it\n  fix: ")
    preempted = launch("deepspeed.sh", "train", "run.yaml", in_each_process="sys.exit(75)")
    assert (preempted.returncode, preempted.stderr) == (75, "")
    assert preempted.stdout == "starting 1 process on this machine\n"


def test_a_signal_to_the_launcher_ends_every_process(code_after_a_signal: InterruptedCode) -> None:
    assert code_after_a_signal(*TWO, "train", "run.yaml", number=signal.SIGTERM) == 128 + 15


def prepared(*words: str) -> tuple[list[str], int]:
    options = deepspeed.runner.parse_args([*words, "train", "run.yaml"])
    return deepspeed._prepare(options, words)


def test_gpus_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    fixed = ["--module", "--no_local_rank", "--log_level", "critical", "--num_gpus", "-1", "--num_nodes", "-1"]

    def gpus(visible: str, *words: str) -> str:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        added, count = prepared(*words)
        assert added[:8] == fixed
        chosen = added[added.index("--include") + 1]
        assert chosen.count(",") + 1 == count
        return chosen

    assert gpus("") == "localhost:0,1,2,3,4,5,6,7"
    assert gpus("", "--num_gpus", "2") == "localhost:0,1"
    assert gpus("4,6,7") == "localhost:4,6,7"
    assert gpus("4,6,7", "--num_gpus=2") == "localhost:4,6"
    with pytest.raises(ConfigError, match="--num_gpus is 4, and there are 3"):
        gpus("4,6,7", "--num_gpus", "4")


def test_what_is_chosen_on_several_machines(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node1 slots=4\nnode2 slots=4\n")
    given = ("--hostfile", str(tmp_path / "hosts"))
    added, count = prepared(*given, "--num_gpus", "2")
    assert count == 2
    assert "--master_port" not in added  # has to be the same on both
    assert prepared(*given, "--include", "node2:1,2,3")[1] == 3
    assert "--log_level" not in prepared(*given, "--log_level", "info")[0]
    with pytest.raises(ConfigError, match="--no_ssh needs --node_rank, from 0 to 1"):
        prepared(*given, "--no_ssh")
    with pytest.raises(ConfigError, match="node3"):
        prepared(*given, "--include", "node3")
    with pytest.raises(ConfigError, match="--no_python"):
        prepared("--no_python")


def test_help_and_usage(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pytest"])
    Path("run.yaml").write_text(SMALLEST, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        deepspeed.main([])
    assert ended.value.code == 0
    told = capfd.readouterr().out
    assert told.startswith("usage: launch/deepspeed.sh [deepspeed options] train CONFIG [--resume auto|PATH|never]")
    assert "--num_gpus" in told
    assert deepspeed.main(["--num_gpus", "2", "trian", "run.yaml"]) == 2
    assert capfd.readouterr().err.count("No such command") == 1
