"""Which node this is, and where the nodes meet."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from sft_dist.errors import ConfigError
from sft_dist.runtime.slurm_step import FIRST_PORT, NUM_PORTS, step_from_environment
from sft_dist.runtime.world import World

LOOPBACK = "127.0.0.1"

# Apart from each other and from neighbouring jobs' ports; another program may have one of them.
MEETING_PORTS, STRIDE = 3, 3331


@dataclass(frozen=True)
class Place:
    """This process among those of the doctor, one on each node.

    Args:
        name: of this node; index: 0 .. size - 1.
        hosts: names of all nodes in their order, where they are known beforehand; else empty.
        first_hosts: names or addresses of the first node, the likeliest first.
        meeting_ports: of the first node, one of which the nodes meet at; empty: any, on one machine alone.
        training_port: of the first node, that training will use; None: it takes any free one.
        meeting_name: the same on all nodes of this doctor and nowhere else.
        speaks: whether this is the node's first process; others only wait for the verdict.
    """

    name: str
    index: int = 0
    size: int = 1
    hosts: tuple[str, ...] = ()
    first_hosts: tuple[str, ...] = (LOOPBACK,)
    meeting_ports: tuple[int, ...] = ()
    training_port: int | None = None
    meeting_name: str = "alone"
    speaks: bool = True

    @property
    def is_first(self) -> bool:
        return self.index == 0 and self.speaks


def find_place(env: Mapping[str, str] = os.environ, *, port: int | None = None) -> Place:
    """From the environment of a SLURM step, or that of torchrun; else this machine alone.

    Args:
        port: that training will use on the first node, where it was said.

    Raises:
        ConfigError: the environment is incomplete or contradicts itself.
    """
    step = step_from_environment(env)
    if step is not None:
        # The training is the next step of the job, and takes that step's port.
        next_port = FIRST_PORT + (step.port - FIRST_PORT + 1) % NUM_PORTS
        # Of the node that called srun: in a job the first one, which may be reached so where its name is not known.
        called_from = env.get("SLURM_LAUNCH_NODE_IPADDR")
        return Place(
            name=step.hosts[step.node_rank],
            index=step.node_rank,
            size=step.num_nodes,
            hosts=step.hosts,
            first_hosts=tuple(dict.fromkeys(host for host in (step.first_host, called_from) if host)),
            meeting_ports=_meeting_ports(step.port),
            training_port=port or _named_port(env) or (next_port if step.num_nodes > 1 else None),
            meeting_name=step.run_id,
            speaks=step.local_task == 0,
        )
    world = World.from_environment(env)
    name = socket.gethostname()
    if world.shape.num_nodes == 1 and world.size == 1:
        return Place(name=name, training_port=port)
    try:
        master, its_port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the launcher's environment is incomplete: {error.args[0]}",
            fix="set MASTER_ADDR and MASTER_PORT on every node, or use srun",
        ) from None
    # Torchrun's own agent listens there.
    is_taken_by_launcher = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Place(
        name=name,
        index=world.rank // world.shape.ranks_per_node,
        size=world.shape.num_nodes,
        first_hosts=(master,),
        meeting_ports=_meeting_ports(its_port + 1),
        training_port=port or (None if is_taken_by_launcher else its_port),
        meeting_name=f"{env.get('TORCHELASTIC_RUN_ID', '')}:{its_port}",
        speaks=world.local_rank == 0,
    )


def _named_port(env: Mapping[str, str]) -> int | None:
    """MASTER_PORT, which the launchers follow where it is set."""
    named = env.get("MASTER_PORT", "")
    return int(named) if named.isdigit() else None


def _meeting_ports(first: int) -> tuple[int, ...]:
    return tuple(FIRST_PORT + (first - FIRST_PORT + number * STRIDE) % NUM_PORTS for number in range(MEETING_PORTS))
