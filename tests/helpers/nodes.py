"""Machines of a small cluster: network and mount namespaces with a name, an address and a way to each other.

Needs root. What runs on a node are real processes, with the environment that a SLURM step gives them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SUBNET = "10.86.0"


@dataclass
class Node:
    """One of them.

    Args:
        holder: the process that keeps its namespaces.
        prefix: commands in front of every command on it, e.g. to lower its priority.
    """

    name: str
    index: int
    holder: subprocess.Popen[bytes]
    prefix: list[str] = field(default_factory=list)

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.holder.pid), "-m", "-n", "-u", *self.prefix, *command]

    def run(self, script: str) -> None:
        """A shell script on the node, which has to succeed."""
        done = subprocess.run(self.enter("sh", "-ec", script), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Ended:
    """A command on a node that has ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Nodes:
    """
    Args:
        hosts: the file that all of them see as /etc/hosts.
    """

    all: list[Node]
    hosts: Path

    def environment(self, node: Node, *, size: int | None = None) -> dict[str, str]:
        """Of a task of a step with one task on each node."""
        size = size or len(self.all)
        return {
            "SLURM_JOB_ID": "77",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NODELIST": ",".join(f"n{number + 1}" for number in range(size)),
            "SLURM_NNODES": str(size),
            "SLURM_STEP_NUM_NODES": str(size),
            "SLURM_STEP_TASKS_PER_NODE": f"1(x{size})",
            "SLURM_NODEID": str(node.index),
            "SLURM_LOCALID": "0",
            "SLURM_PROCID": str(node.index),
            "SLURMD_NODENAME": node.name,
            "SLURM_LAUNCH_NODE_IPADDR": f"{SUBNET}.1",
        }

    def start(
        self,
        node: Node,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        size: int | None = None,
    ) -> subprocess.Popen[str]:
        """Python with these arguments, on a node."""
        own = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        paths = [*([env["PYTHONPATH"]] if env and "PYTHONPATH" in env else []), str(ROOT)]
        environment = own | self.environment(node, size=size) | dict(env or {}) | {"PYTHONPATH": ":".join(paths)}
        return subprocess.Popen(
            node.enter(sys.executable, *arguments),
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(processes: Sequence[subprocess.Popen[str]], *, within_s: float) -> list[Ended]:
    """Waits for processes; those that take longer are killed, and fail the test."""
    started, found = time.monotonic(), []
    try:
        for process in processes:
            left = max(0.1, within_s - (time.monotonic() - started))
            out, err = process.communicate(timeout=left)
            found.append(Ended(process.returncode, out, err, time.monotonic() - started))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


@contextmanager
def nodes(folder: Path, count: int) -> Iterator[Nodes]:
    """So many nodes n1, n2, ..., joined by a switch; they end with the context."""
    holders: list[subprocess.Popen[bytes]] = []
    hosts = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{SUBNET}.{number + 1} n{number + 1}" for number in range(count))]
    hosts.write_text("\n".join(lines) + "\n")
    try:
        switch = _hold(holders, "--net")
        _inside(switch, "ip link add br0 type bridge && ip link set br0 up")
        made = []
        for number in range(count):
            node = Node(
                f"n{number + 1}", number, _hold(holders, "--net", "--uts", "--mount", "--propagation", "private")
            )
            _inside(
                switch,
                f"ip link add v{number} type veth peer name eth0 netns {node.holder.pid} && "
                f"ip link set v{number} master br0 up",
            )
            # A copy of its own, so that a test may change what one node knows.
            own = folder / f"hosts.{node.name}"
            own.write_text(hosts.read_text())
            node.run(
                f"hostname {node.name}; ip link set lo up; ip addr add {SUBNET}.{number + 1}/24 dev eth0; "
                f"ip link set eth0 up; mount --bind {own} /etc/hosts"
            )
            made.append(node)
        yield Nodes(made, hosts)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def _hold(holders: list[subprocess.Popen[bytes]], *namespaces: str) -> subprocess.Popen[bytes]:
    """A process that is alone in new namespaces."""
    before = os.readlink("/proc/self/ns/net")
    holder = subprocess.Popen(["unshare", *namespaces, "sleep", "infinity"])
    holders.append(holder)
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{holder.pid}/ns/net") == before or _name(holder) != "sleep":
        assert holder.poll() is None, "namespaces cannot be made"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return holder


def _name(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text().strip()


def _inside(holder: subprocess.Popen[bytes], script: str) -> None:
    done = subprocess.run(["nsenter", "-t", str(holder.pid), "-n", "sh", "-ec", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
