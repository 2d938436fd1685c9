"""How many processes a run has, and which one this is.

``WorldShape`` is arithmetic only: ``resolve`` and a plan made on a laptop use it. ``World`` is the same run seen from
inside one of its processes. Neither imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sft_dist.errors import ConfigError

# Torchrun's, in every process that it starts: how often it has started those of this node again after a failure. A node
# that starts again only because another one does leaves it as it is; so the scripts of launch/ set a variable of their
# own, "RESTARTS-NAME", the same for all processes of an attempt.
RESTART_COUNT, ATTEMPT = "TORCHELASTIC_RESTART_COUNT", "SFT_DIST_ATTEMPT"


def attempt_name(env: Mapping[str, str] = os.environ) -> str:
    """Of this start of the processes, among those of the same launch."""
    return env.get(ATTEMPT) or env.get(RESTART_COUNT, "0")


def restarts(env: Mapping[str, str] = os.environ) -> int:
    """How often the processes of this launch have been started again."""
    return int(attempt_name(env).partition("-")[0])


@dataclass(frozen=True)
class WorldShape:
    """The processes of a run.

    Args:
        num_nodes: machines.
        ranks_per_node: processes on each of them, one for each accelerator.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(f"a world has at least one process, got {self}")

    @property
    def size(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Args:
        rank: 0 .. size-1 over all nodes.
        local_rank: 0 .. ranks_per_node-1 on this node; also the index of this process' accelerator.
        shape: all processes.
    """

    rank: int
    local_rank: int
    shape: WorldShape

    @property
    def size(self) -> int:
        return self.shape.size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> World:
        """Reads what torchrun, ``accelerate launch`` and ``deepspeed`` set; alone, a world of one.

        Raises:
            ConfigError: the variables are incomplete or contradict each other.
        """
        if "RANK" not in env and "WORLD_SIZE" not in env:
            return cls(rank=0, local_rank=0, shape=WorldShape())
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            local_rank = int(env["LOCAL_RANK"])
            per_node = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", size)))  # DeepSpeed's has the second name
        except (KeyError, ValueError) as e:
            raise ConfigError(
                f"the launcher's environment is incomplete: {e.args[0]} (RANK, WORLD_SIZE and LOCAL_RANK are needed)",
                fix="start with launch/torchrun.sh, or unset RANK and WORLD_SIZE to run alone",
            ) from None
        if per_node < 1 or size % per_node or not 0 <= rank < size or not 0 <= local_rank < per_node:
            raise ConfigError(
                f"the launcher's environment contradicts itself: RANK={rank} WORLD_SIZE={size} "
                f"LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={per_node}",
                fix="give every node the same number of processes",
            )
        return cls(rank=rank, local_rank=local_rank, shape=WorldShape(size // per_node, per_node))
