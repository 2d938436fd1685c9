"""What follows a start of the training job: decided from exit codes, SLURM's word and the job's history alone."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import sft_dist
from sft_dist.cluster import attempts, nodes, slurm
from sft_dist.cluster.attempts import Attempt, note_begin, note_end, read_attempts
from sft_dist.cluster.policy import PREEMPTED, JobNow, decide, fruitless_in_a_row
from sft_dist.cluster.slurm import NodeState
from sft_dist.runtime import exit_notes


def job(state: str = "RUNNING", restarts: int = 1, *, requeue: bool = True, preempted: bool = False) -> JobNow:
    return JobNow(state, restarts, requeue, preempted)


@pytest.mark.parametrize(
    ("code", "now", "fruitless", "what", "why"),
    [
        (0, job(), 0, "done", "the run is done"),
        (0, job("COMPLETING"), 9, "done", "the run is done"),
        (0, job("COMPLETING", restarts=2), 0, "leave", "SLURM has put the job back into the queue itself"),
        (2, job(), 1, "give up", "exit code 2 (usage or configuration): another start would end the same way"),
        (3, job(), 0, "give up", "exit code 3 (does not fit the devices)"),
        (4, job(), 0, "give up", "exit code 4 (data)"),
        (5, job(), 0, "give up", "exit code 5 (model or checkpoint)"),
        (6, job(), 0, "give up", "exit code 6 (training diverged)"),
        (130, job(), 0, "give up", "exit code 130 (interrupted)"),
        (7, job(), 2, "requeue", "exit code 7: a machine is not fit for training"),
        (7, job(), 3, "give up", "3 starts in a row got no further than the last checkpoint"),
        (75, job(), 0, "requeue", "stopped by a signal"),
        (75, job(preempted=True), 9, "requeue", PREEMPTED),
        (75, job("COMPLETING"), 0, "leave", "the job is completing: cancelled, or at its time limit"),
        (75, job("CANCELLED"), 0, "leave", "the job is cancelled"),
        (137, job("COMPLETING"), 0, "leave", "the job is completing"),
        (4, job("COMPLETING"), 0, "leave", "the job is completing"),
        (75, job("COMPLETING", restarts=2), 0, "leave", "SLURM has put the job back into the queue itself"),
        (143, job("PENDING", restarts=2), 0, "leave", "SLURM has put the job back into the queue itself"),
        (137, job(), 1, "requeue", "a process was ended by signal 9"),
        (1, job(), 2, "requeue", "exit code 1: unexpected"),
        (1, job(), 3, "give up", "3 starts in a row"),
        (75, job(), 3, "give up", "3 starts in a row"),
        (137, job(requeue=False), 0, "give up", "the job was submitted with --no-requeue"),
    ],
)
def test_what_follows(code: int, now: JobNow, fruitless: int, what: str, why: str) -> None:
    decision = decide(code, now, restart=1, fruitless=fruitless, max_restarts=2)
    assert (decision.what, decision.reason[: len(why)]) == (what, why)


def attempt(
    before: int, after: int | None, *, decision: str = "requeue", reason: str = "", blamed: tuple[str, ...] = ()
) -> Attempt:
    return Attempt("1", 0, ("a", "b"), 0.0, before, 1.0, 1, after, decision, reason, blamed)


def test_starts_that_got_no_further_are_counted_in_a_row() -> None:
    assert fruitless_in_a_row([], now=0) == 0
    assert fruitless_in_a_row([attempt(0, 0), attempt(0, 0)], now=0) == 2
    assert fruitless_in_a_row([attempt(0, 0), attempt(0, 5), attempt(5, 5)], now=5) == 1
    running = Attempt("1", 3, ("a",), 0.0, 5)
    assert fruitless_in_a_row([attempt(5, 5), running], now=5) == 2
    assert fruitless_in_a_row([attempt(5, 5), running], now=6) == 0
    neither = [attempt(5, 5, decision="leave"), attempt(5, 5, reason=PREEMPTED)]
    assert fruitless_in_a_row([attempt(5, 5), *neither, attempt(5, 5, decision="lost")], now=5) == 2


def test_attempts_survive_a_process_that_died_while_it_wrote(tmp_path: Path) -> None:
    first = note_begin(tmp_path, "7", 0, ["a", "b"], step=0)
    note_end(tmp_path, first, code=75, step=4, decision="requeue", reason="r", blamed=["b"])
    note_begin(tmp_path, "7", 1, ["a"], step=4)
    with attempts.attempts_file(tmp_path).open("a") as file:
        file.write('{"event": "ended", "job": "7", "rest')
    one, two = read_attempts(tmp_path)
    assert (one.code, one.decision, one.step_before, one.step_after, one.blamed) == (75, "requeue", 0, 4, ("b",))
    assert one.ended is not None
    assert one.ended >= one.began
    assert two.is_open
    note_end(tmp_path, two, code=None, step=4, decision="lost", reason="gone")
    note_begin(tmp_path, "8", 0, ["a"], step=4)
    assert [(x.job, x.restart, x.decision, x.ended is None) for x in read_attempts(tmp_path)] == [
        ("7", 0, "requeue", False), ("7", 1, "lost", True), ("8", 0, None, True),
    ]  # fmt: skip
    assert read_attempts(tmp_path / "nothing") == []


def noted(folder: Path, *codes: int | None) -> Path:
    for number, code in enumerate(codes):
        exit_notes.begin(folder, number)
        if code is not None:
            exit_notes.write(folder, number, code)
    return folder


@pytest.mark.parametrize(
    ("codes", "told", "code", "blamed"),
    [
        ((137, 1), 137, 137, ["host0"]),  # a rank of the first was killed, the second lost its peer
        ((1, None), 137, 137, ["host1"]),  # a launcher was killed
        ((1, 4), 4, 4, []),
        ((137, 4), 137, 4, []),  # a named failure is the cause, though srun gives the highest
        ((75, 75), 75, 75, []),
        ((75, 1), 75, 1, []),
        ((137, 137), 137, 137, []),  # both: none of them alone
        ((143, 137), 143, 137, ["host1"]),
        ((0, 0), 0, 0, []),
        ((0, None), 0, 137, ["host1"]),  # srun has lost a node, and heard of no task that failed
        ((7, None), 137, 137, ["host1"]),  # the second launcher was killed, and the first says that it lost its peer
        ((), 137, 137, []),
        ((75, 75), 138, 75, []),  # before it had begun to listen
        ((1, 139), 139, 139, ["host1"]),
    ],
)
def test_the_code_that_counts_and_the_node_that_is_to_blame(
    tmp_path: Path,
    codes: tuple[int | None, ...],
    told: int,
    code: int,
    blamed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"host{number}" for number in range(2)]
    folder = noted(tmp_path / "notes", *codes)
    for number, _ in enumerate(codes):
        (folder / f"began-{number}").write_text(f"host{number}.cluster.example")
    by_node = nodes.codes_by_node(folder, names)
    assert nodes.code_of_all(by_node, told) == code
    assert list(nodes.crashed_node(by_node)) == blamed


def test_nodes_that_went_down_and_those_that_fail_too_often(tmp_path: Path) -> None:
    def node(name: str, *states: str, started: float = 50.0) -> NodeState:
        return NodeState(name, frozenset(states), datetime.fromtimestamp(started), None, "")

    states = {"a": node("a", "IDLE"), "b": node("b", "DOWN", "NOT_RESPONDING"), "c": node("c", "MIXED", started=150.0)}
    assert nodes.lost_nodes(states, since=100.0) == {"b": "is DOWN+NOT_RESPONDING", "c": "went down and came up again"}
    history = [attempt(0, 0, blamed=("b",)), attempt(0, 0, blamed=("a", "c")), attempt(0, 9, blamed=("b",))]
    assert nodes.blamed_enough(history) == ["b"]
    assert nodes.failed_in_doctor(tmp_path) == {}
    (tmp_path / "doctor.json").write_text(json.dumps({"failed_nodes": ["c"]}))
    assert nodes.failed_in_doctor(tmp_path) == {"c": "did not pass the doctor"}


def test_what_slurm_prints_is_read() -> None:
    line = "JobId=12 JobName=two words UserId=root(0) JobState=RUNNING Requeue=1 ReqB:S:C:T=0:0:*:* Command=/a b/c TRES=cpu=2,node=1"
    assert slurm.parse_record(line) == {
        "JobId": "12", "JobName": "two words", "UserId": "root(0)", "JobState": "RUNNING", "Requeue": "1",
        "ReqB:S:C:T": "0:0:*:*", "Command": "/a b/c", "TRES": "cpu=2,node=1",
    }  # fmt: skip
    assert [slurm.seconds(text) for text in ("00:10:00", "1-02:00:03", "UNLIMITED")] == [600, 93603, None]


def test_a_jobs_life_needs_no_package() -> None:
    """Beside a container the job's script has a Python and nothing else."""
    checkout = Path(sft_dist.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import sft_dist.cluster.job"],
        env={"PYTHONPATH": str(checkout)},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
