"""A job that trains the small run on two nodes, and what can be done to its processes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.cluster.attempts import Attempt, read_attempts
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import REPOSITORY

# Of the command lines of a job.
RANK, LAUNCHER = re.compile(r"-m sft_dist train "), re.compile(r"-m sft_dist\.launch\b")

SCRIPT = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append --output={output}/slurm/train-%j.out
set -euo pipefail
cd {repository}
export SFT_DIST_JOB_NOTES={output}/slurm/notes/$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
job() {{ python -m sft_dist.cluster.job "$@" --max-restarts {max_restarts}; }}
trap : TERM
code=0
job begin {output} || code=$?
if [ $code = 99 ]; then exit 0; elif [ $code != 0 ]; then exit $code; fi
srun --kill-on-bad-exit=0 --wait=40 {command} || code=$?
job end {output} --code $code
"""


@dataclass(frozen=True)
class Job:
    """A job in the queue or beyond, and the run directory that it works on."""

    cluster: Cluster
    id: str
    output: Path

    def lines(self) -> list[dict[str, Any]]:
        """Of ``metrics.jsonl``, without those of evaluations and one that is being written."""
        file = self.output / "metrics.jsonl"
        whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        return [line for line in map(json.loads, whole) if "loss" in line]

    def last_step(self) -> int:
        return max((int(line["step"]) for line in self.lines()), default=0)

    def said(self) -> str:
        file = self.output / f"slurm/train-{self.id}.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def attempts(self) -> list[Attempt]:
        return read_attempts(self.output)

    def wait_for_step(self, step: int, timeout_s: float = 180) -> None:
        self.cluster.wait_for(lambda: self.last_step() >= step, timeout_s, what=f"step {step} is trained", job=self.id)

    def wait_for_start(self, number: int, timeout_s: float = 120) -> None:
        self.cluster.wait_for(
            lambda: len(self.attempts()) >= number, timeout_s, what=f"start {number} of the job", job=self.id
        )

    def processes(self, kind: re.Pattern[str], *nodes: str) -> list[int]:
        """Pids on this machine."""
        where = nodes or tuple(self.cluster.nodes)
        return [pid for node in where for pid, line in self.cluster.pids(node).items() if kind.search(line)]

    @contextmanager
    def held(self) -> Iterator[list[int]]:
        """Its ranks stand still meanwhile, so that it cannot end before what is to happen to it; yields their pids."""
        ranks = self.processes(RANK)
        assert ranks
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield ranks
        finally:
            for pid in ranks:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGCONT)


def submit_training(
    cluster: Cluster, config: Path, output: Path, *options: str, processes: int = 2, max_restarts: int = 3
) -> Job:
    """Two nodes with so many processes each."""
    command = f"launch/torchrun.sh --nproc-per-node {processes} train {config} --resume auto"
    return submit_script(cluster, output, command, *options, max_restarts=max_restarts)


def submit_script(cluster: Cluster, output: Path, command: str, *options: str, max_restarts: int = 3) -> Job:
    """A job whose step is any command."""
    (output / "slurm").mkdir(parents=True, exist_ok=True)
    text = SCRIPT.format(output=output, repository=REPOSITORY, command=command, max_restarts=max_restarts)
    return Job(cluster, cluster.submit(text, *options), output)


def was_sent(pid: int, number: signal.Signals) -> bool:
    """Whether a process that stood still got a signal; SLURM may send SIGCONT first, and then it may have ended."""
    try:
        status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except FileNotFoundError:
        return True
    return not status["State"].startswith("T") or bool(int(status["ShdPnd"], 16) & 1 << (number - 1))
