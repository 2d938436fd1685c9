"""What the training job's script calls, with a program that answers for SLURM and notes what it is asked to do."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sft_dist.cluster import job
from sft_dist.cluster.attempts import Attempt, note_begin, note_end, read_attempts

SCONTROL = """#!/bin/sh
[ -e {folder}/busy ] && rm {folder}/busy && echo "slurm_load_jobs error: Unable to contact slurm controller" && exit 1
case "$*" in
    *"show job"*) /bin/cat {folder}/job ;;
    *"show node"*) /bin/cat {folder}/nodes ;;
    *) echo "$*" >> {folder}/done ;;
esac
"""
JOB = (
    "JobId=12 JobName=run JobState={state} Reason=None Requeue=1 Restarts={restarts} ExitCode=0:0 TimeLimit=01:00:00 "
    "SubmitTime=2026-01-01T00:00:00 StartTime=2026-01-01T00:00:00 EndTime=2026-01-01T01:00:00 Partition=main "
    "NodeList=n1,n2 ExcNodeList={excluded}\n"
)
NODE = "NodeName={name} State={state} BootTime=2020-01-01T00:00:00 SlurmdStartTime=2020-01-01T00:00:00\n"


@dataclass
class Slurm:
    """What it answers; ``restarts`` is what the script's own environment has, too."""

    folder: Path
    run: Path
    patch: pytest.MonkeyPatch

    def says(self, *, state: str = "RUNNING", restarts: int = 0, excluded: str = "(null)", down: str = "") -> None:
        self.patch.setenv("SLURM_RESTART_COUNT", str(restarts))
        (self.folder / "job").write_text(JOB.format(state=state, restarts=restarts, excluded=excluded))
        lines = [NODE.format(name=name, state="DOWN" if name == down else "ALLOCATED") for name in ("n1", "n2")]
        (self.folder / "nodes").write_text("".join(lines))

    @property
    def done(self) -> list[str]:
        """What it was asked to do, and forgets with that."""
        path = self.folder / "done"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def begin(self, *options: str) -> int:
        return job.main(["begin", str(self.run), *options])

    def end(self, code: int, *options: str, restart: int = 0, exits: tuple[int, ...] = ()) -> tuple[int, Attempt]:
        """Ends a start whose launchers left these codes, and returns the job's exit code and what was noted."""
        notes = self.run / "slurm" / "notes" / f"12-{restart}"
        for node, each in enumerate(exits):
            (notes / f"exit-{node}").write_text(str(each))
        result = job.main(["end", str(self.run), "--code", str(code), *options])
        return result, read_attempts(self.run)[-1]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    folder, before = tmp_path / "bin", signal.getsignal(signal.SIGTERM)
    folder.mkdir()
    (folder / "scontrol").write_text(SCONTROL.format(folder=folder))
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(job, "PAUSE_S", 0.0)
    made = Slurm(folder, tmp_path / "run", monkeypatch)
    made.says()
    yield made
    signal.signal(signal.SIGTERM, before)


def test_a_node_that_failed_twice_is_left_out(slurm: Slurm) -> None:
    # An earlier job of this run blamed the other node: that is history.
    for restart in (0, 1):
        old = note_begin(slurm.run, "11", restart, ["n1", "n2"], step=0)
        note_end(slurm.run, old, code=137, step=0, decision="requeue", reason="", blamed=["n1"])
    assert slurm.begin() == 0
    code, first = slurm.end(137, exits=(1, 137))
    assert (code, first.decision, first.blamed, slurm.done) == (137, "requeue", ("n2",), ["requeue 12"])
    slurm.says(restarts=1, excluded="n3")
    assert slurm.begin() == 0
    _, second = slurm.end(137, restart=1, exits=(1, 137))
    assert (second.restart, second.blamed) == (1, ("n2",))
    assert slurm.done == ["requeue 12", "update JobId=12 ExcNodeList=n2,n3"]
    # It was given to the job before SLURM had heard of that.
    slurm.says(restarts=2, excluded="n3")
    assert slurm.begin() == 75
    assert read_attempts(slurm.run)[-1].reason == "n2 failed this job 2 times: without it"
    assert slurm.done == ["requeue 12", "update JobId=12 ExcNodeList=n2,n3"]


def test_the_codes_are_those_of_this_very_start(slurm: Slurm) -> None:
    slurm.begin()
    slurm.end(137, exits=(1, 137))
    slurm.says(restarts=1)
    slurm.begin()
    code, attempt = slurm.end(75, restart=1)
    assert (code, attempt.code, attempt.blamed) == (75, 75, ())


@pytest.mark.parametrize("word", [True, False], ids=["told of its end", "lost with its first node"])
def test_so_many_starts_for_nothing_and_no_more(slurm: Slurm, word: bool) -> None:
    asked = ("--max-restarts", "1")
    for restart in (0, 1):
        slurm.says(restarts=restart)
        assert slurm.begin(*asked) == 0
        if word:
            code, attempt = slurm.end(1, *asked, restart=restart)
            assert (code, attempt.decision) == (1, ("requeue", "give up")[restart])
    assert slurm.done == (["requeue 12"] if word else [])
    slurm.says(restarts=2)
    assert slurm.begin(*asked) == 1
    assert (read_attempts(slurm.run)[-1].decision, slurm.done) == ("give up", [])


def test_a_run_that_is_done_and_one_whose_node_took_its_word_with_it(slurm: Slurm) -> None:
    slurm.says(down="n2")
    slurm.begin()
    code, attempt = slurm.end(0, exits=(0,))
    assert (code, attempt.decision, attempt.blamed, slurm.done) == (1, "requeue", ("n2",), ["requeue 12"])
    (slurm.run / "final").mkdir()
    slurm.says(restarts=1)
    assert slurm.begin() == 0
    code, attempt = slurm.end(0, restart=1, exits=(0, 0))
    assert (code, attempt.decision, slurm.done) == (0, "done", [])
    slurm.says(restarts=2)
    assert slurm.begin() == 99


@pytest.mark.parametrize(("code", "blamed"), [(7, ("n2",)), (1, ())])
def test_the_doctor_names_nodes_where_it_ended_the_start(slurm: Slurm, code: int, blamed: tuple[str, ...]) -> None:
    slurm.begin()
    (slurm.run / "slurm" / "notes" / "12-0" / "doctor.json").write_text(json.dumps({"failed_nodes": ["n2"]}))
    assert slurm.end(code)[1].blamed == blamed


def test_a_job_that_is_cancelled_blames_nobody_and_does_not_come_back(slurm: Slurm) -> None:
    slurm.begin()
    slurm.says(state="COMPLETING")
    code, attempt = slurm.end(137, exits=(1, 137))
    assert (code, attempt.decision, attempt.blamed, slurm.done) == (137, "leave", (), [])


def test_a_controller_that_is_busy_is_asked_again_and_sigterm_ends_nothing(slurm: Slurm) -> None:
    (slurm.folder / "busy").touch()
    assert slurm.begin() == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
