"""launch/torchrun.sh with real processes: what they inherit, and what reaches the shell when one of them fails."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo

from sft_dist.errors import ConfigError, MachineError
from sft_dist.launch.agent import NodePlace, _take_place
from sft_dist.launch.elastic import address_of_this_node, await_rendezvous, run_elastic
from sft_dist.launch.outcome import exit_code
from sft_dist.launch.torchrun import _parse, _prepare, _run, main
from tests.helpers.pool import free_port
from tests.launch.conftest import SMALLEST, InterruptedCode, Launch, command_line, without_logs_line


def test_processes_share_the_cores_and_meet_on_a_free_port(launch: Launch) -> None:
    finished = launch(
        *("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml", "train.seed=7"),
        in_each_process="print(rank, config.train.seed, *map(os.environ.get, ('WORLD_SIZE', 'OMP_NUM_THREADS', 'MASTER_PORT')))",
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    starting, *printed = without_logs_line(finished.stdout)
    assert starting == "starting 2 processes on this machine"
    first, second = sorted(line.split() for line in printed)
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert (first[:4], second[:4]) == (["0", "7", "2", threads], ["1", "7", "2", threads])
    assert first[4] == second[4] != "29500"


def test_a_mistake_that_one_process_alone_meets_is_told(launch: Launch) -> None:
    finished = launch(
        *("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml"),
        in_each_process="import time; from sft_dist.errors import ConfigError\n"
        "if rank == 0: time.sleep(60)\n"
        "raise ConfigError('local rank 1 has no GPU', fix='start 1 process')",
    )
    assert finished.returncode == 2
    assert finished.stderr == "error: local rank 1 has no GPU\n  fix: start 1 process\n"


def test_preempted_passes_through(launch: Launch) -> None:
    finished = launch("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml", in_each_process="sys.exit(75)")
    assert (finished.returncode, finished.stderr) == (75, "")


def test_a_killed_process_is_named(launch: Launch) -> None:
    finished = launch(
        *("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml"),
        in_each_process="import time; time.sleep(60) if rank == 0 else os.kill(os.getpid(), 9)",
    )
    assert finished.returncode == 128 + 9
    assert finished.stderr.splitlines() == [
        "error: rank 1 was ended by SIGKILL, and the run with it",
        "  fix: if nobody sent it, memory ran out: see `dmesg`, then lower train.micro_batch_size or data.max_seq_len",
    ]


def test_a_missing_file_starts_no_process(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").unlink()
    finished = launch("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml", in_each_process="print('started')")
    assert (finished.returncode, finished.stdout) == (4, "")
    assert finished.stderr.startswith("error: a.jsonl does not exist")


def test_an_unexpected_failure_keeps_the_report_of_torchrun(launch: Launch) -> None:
    finished = launch("torchrun.sh", "train", "run.yaml", in_each_process="raise ValueError('a defect')")
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


def test_interrupt_ends_every_process(code_after_a_signal: InterruptedCode) -> None:
    assert code_after_a_signal("torchrun.sh", "--nproc-per-node", "2", "train", "run.yaml", number=signal.SIGINT) == 130


@pytest.mark.ci
def test_two_nodes(environment: dict[str, str], tmp_path: Path) -> None:
    """Two launchers on this machine meet as two nodes do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    statement = "print(*map(os.environ.get, ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')))"
    meeting = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}")
    nodes = [
        subprocess.Popen(
            command_line("torchrun.sh", *meeting, "--nproc-per-node", "1", "train", "run.yaml"),
            cwd=tmp_path,
            env=environment | {"IN_EACH_PROCESS": statement},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        answers = [node.communicate(timeout=60) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [(node.returncode, errors) for node, (_, errors) in zip(nodes, answers, strict=True)] == [(0, "")] * 2
    lines = without_logs_line("".join(out for out, _ in answers))
    # The first node's address, not its host name, which the other could not always resolve.
    expected = ["0 2 0 1 127.0.0.1", "1 2 0 1 127.0.0.1", *["starting 1 process on this machine"] * 2]
    assert sorted(lines) == expected


def test_a_node_gives_the_address_that_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_of_this_node("127.0.0.1:29400") == address_of_this_node("localhost:29400") == "127.0.0.1"
    # A node's own name often stands for the loopback on that node.
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", ("127.0.1.1", 29400))]
    )
    assert address_of_this_node("node1") is None
    for endpoint, problem in {"node1:x": "port", "node1:99999999": "port"}.items():
        with pytest.raises(ConfigError, match=problem):
            address_of_this_node(endpoint)


def test_a_rendezvous_that_no_one_can_find(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "run.yaml").write_text(SMALLEST, encoding="utf-8")
    assert (
        main(["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "nowhere.invalid", "train", "run.yaml"])
        == 2
    )
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: the rendezvous endpoint nowhere.invalid: ")


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
        ({0: -10, 1: 75}, 75),  # rank 0 had not begun to listen to SIGUSR1
        ({0: 1, 1: -9}, 137),  # rank 0 lost its peer, which was killed
        ({0: 130, 1: -2}, 130),
        ({0: 1, 1: -15}, 1),
        ({2: -9, 3: -15}, 137),
        ({0: -15, 1: -15}, 143),
    ],
)
def test_exit_code_of_several_processes(by_rank: dict[int, int], code: int) -> None:
    assert exit_code(by_rank) == code


def test_nodes_are_numbered_as_the_scheduler_does() -> None:
    """A rendezvous sorts n2 behind n10; all nodes of a step know their places. A smaller round has no such order."""
    info = RendezvousStoreInfo("n10", 29400)

    class Handler:
        def __init__(self, num_nodes: int) -> None:
            self.num_nodes = num_nodes

        def next_rendezvous(self) -> RendezvousInfo:
            return RendezvousInfo(HashStore(), 0, self.num_nodes, info)

    for num_nodes, rank in ((11, 9), (10, 0)):
        handler = Handler(num_nodes)
        _take_place(handler, NodePlace(9, 11))  # type: ignore[arg-type]
        met = handler.next_rendezvous()
        assert (met.rank, met.world_size, met.bootstrap_store_info) == (rank, num_nodes, info)


def test_nodes_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two nodes one comes, which keeps the rendezvous; of another rendezvous the keeper does not come."""
    monkeypatch.setenv("SFT_DIST_MEETING_S", "1")
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-conf", "join_timeout=1"]
    options, _ = _parse([*meeting, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "train", "run.yaml"])
    _prepare(options)
    options.module, options.training_script, options.training_script_args = True, "sft_dist", []
    with pytest.raises(MachineError, match=r"launch/torchrun\.sh: not all of the 2 nodes came"):
        run_elastic(lambda folder: _run(options, folder), program="launch/torchrun.sh", num_nodes="2")
    with pytest.raises(MachineError, match=r"the first node, 192\.0\.2\.1, did not answer on port 29400 within 1 s"):
        await_rendezvous("launch/torchrun.sh", "192.0.2.1:29400")  # an address that is kept for documents


def test_a_rendezvous_that_is_gone_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    """The first node's launcher may end before the others have said farewell; their runs are over by then, too."""
    logger = logging.getLogger("torch.distributed.elastic.rendezvous.dynamic_rendezvous")

    def run(_: str) -> None:
        node = "The node 'n' has failed to shutdown the rendezvous 'none' due to an error of type RendezvousConnectionError."
        logger.warning(node)
        logger.warning("something else")

    assert run_elastic(run, program="launch/torchrun.sh") == 0
    assert [record.getMessage() for record in caplog.records] == ["something else"]
