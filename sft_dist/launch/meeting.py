"""Where the nodes of a SLURM step meet, and over which network; each finds it out by itself. Imports no torch."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sft_dist.errors import ConfigError, MachineError
from sft_dist.runtime import exit_notes
from sft_dist.runtime.meeting import LAUNCHER, no_answer, patience_s
from sft_dist.runtime.network import answers, interface_of, is_free, own_address_towards
from sft_dist.runtime.slurm_step import Step, nodes_of_the_job, step_from_environment

GLOO_INTERFACE, NCCL_INTERFACE = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
HOST, PORT = "MASTER_ADDR", "MASTER_PORT"


@dataclass(frozen=True)
class Meeting:
    """Of the launchers, or the processes, of a step's nodes.

    Args:
        program: the script that asks, for messages.
        step: that it is a task of.
        host: the first node, by a name or address that this node can resolve.
        port: on it.
        own_address: of this node, on the way to the others.
    """

    program: str
    step: Step
    host: str
    port: int
    own_address: str

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def step_of_launcher(program: str, env: Mapping[str, str] = os.environ) -> Step | None:
    """The step, where this is its one task on one of several nodes; None on a single machine.

    Raises:
        ConfigError: it runs in the batch shell of a job with several nodes, or there are several tasks on this node.
    """
    step = step_from_environment(env)
    if step is None:
        num_nodes = nodes_of_the_job(env)
        if num_nodes > 1:
            raise ConfigError(
                f"{program} was started on one node alone, and the job has {num_nodes}",
                fix=f"start it on every node: srun --ntasks-per-node=1 {program} train CONFIG",
            )
        return None
    if step.num_tasks_here > 1:
        if not step.is_first:
            sys.exit(ConfigError.exit_code)  # the first task tells
        raise ConfigError(
            f"{program} was started {step.num_tasks_here} times on this node, and starts the processes itself",
            fix=f"srun --ntasks={step.num_nodes} --ntasks-per-node=1 {program} ..., or launch/srun.sh, which takes a "
            "task for each process",
        )
    return step if step.num_nodes > 1 else None


def meeting_of(step: Step, *, program: str, env: Mapping[str, str] = os.environ) -> Meeting:
    """Where the step's nodes meet: on its first node, unless MASTER_ADDR and MASTER_PORT say otherwise.

    Raises:
        ConfigError: MASTER_PORT is no port.
        MachineError: a node's name has no address here, or no way leads there.
    """
    host = env.get(HOST) or step.first_host
    # From the first node to the second, because a node's own name may stand for its loopback.
    target = step.hosts[1] if step.node_rank == 0 and step.num_nodes > 1 else host
    _address_of(host, step, program)
    return Meeting(program, step, host, _port(step, env), _address_of(target, step, program))


def _port(step: Step, env: Mapping[str, str]) -> int:
    given = env.get(PORT)
    if not given:
        return step.port
    if not given.isdigit() or not 0 < int(given) < 2**16:
        raise ConfigError(f"{PORT} is {given!r}, which is no port", fix=f"unset {PORT}, or give 1 to 65535")
    return int(given)


def _address_of(host: str, step: Step, program: str) -> str:
    """This node's own on the way there."""
    own = socket.gethostname()
    try:
        address = own_address_towards(host)
    except OSError as error:
        raise MachineError(
            f"{program}: {own} finds no way to the node {host}: {error.strerror}",
            fix=f"name {host} in the DNS or in /etc/hosts of every node, or set {HOST} to the first node's address",
        ).everywhere() from error
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and host not in (own, step.hosts[step.node_rank]):
        raise MachineError(
            f"{program}: on {own}, the name of the node {host} stands for {address}, this machine itself",
            fix=f"mend {host} in /etc/hosts of {own}, or set {HOST} to the first node's address",
        ).everywhere()
    return address


def choose_network(meeting: Meeting) -> None:
    """Sets the interface that gloo and NCCL use, where the user has not; the first node says so.

    NCCL takes it to find its peers; the data go over InfiniBand all the same where there is one.
    """
    step, interface = meeting.step, interface_of(meeting.own_address)
    os.environ.setdefault(GLOO_INTERFACE, interface)
    os.environ.setdefault(NCCL_INTERFACE, f"={interface}")  # with "=" it is a name, else a prefix
    if step.is_first:
        used = {os.environ[GLOO_INTERFACE], os.environ[NCCL_INTERFACE].removeprefix("=")}
        print(
            f"{step.num_nodes} nodes, {step.hosts[0]} to {step.hosts[-1]}: meeting at {meeting.endpoint} over "
            f"{' and '.join(sorted(used))}",
            flush=True,
        )


def claim_port(meeting: Meeting) -> None:
    """On the first node: nothing else listens there.

    Raises:
        MachineError: something does.
    """
    if meeting.step.node_rank == 0 and not is_free(meeting.port):
        raise MachineError(
            f"{meeting.program}: port {meeting.port} of {meeting.host} is in use",
            fix=f"set {PORT} to a free one, the same on all nodes",
        )


def await_first_node(meeting: Meeting) -> None:
    """On the other nodes: waits until the first node's launcher listens.

    Raises:
        MachineError: it does not, within the time that nodes are given.
    """
    if meeting.step.node_rank > 0 and not answers(meeting.host, meeting.port, within_s=patience_s()):
        raise no_answer(meeting.program, meeting.host, meeting.port, within_s=patience_s())


def tell_processes(program: str) -> None:
    """Lets the processes name the launcher when they do not find each other, and wait no longer than it would."""
    os.environ[LAUNCHER] = program


@contextmanager
def noted_exit(*, as_task: bool = False) -> Iterator[None]:
    """Leaves the exit code for who looks after the job (``exit_notes``).

    Args:
        as_task: each task of a node is to leave its own.
    """
    try:
        step = step_from_environment()
    except ConfigError:
        step = None  # told by what starts the processes
    node = 0 if step is None else step.node_rank
    task = step.local_task if as_task and step is not None else None
    with exit_notes.noting(node, task=task):
        yield
