"""How long the machines of a run wait for the first one, and what is said when it does not answer."""

from __future__ import annotations

import os

from sft_dist.errors import ConfigError, MachineError

# Set by the scripts of launch/ for processes that meet by themselves: the script's name.
LAUNCHER = "SFT_DIST_LAUNCHER"

# For the user, where nodes start further apart: a container that each of them pulls first.
PATIENCE, DEFAULT_PATIENCE_S = "SFT_DIST_MEETING_S", 45


def patience_s() -> int:
    """Seconds.

    Raises:
        ConfigError: the variable has something else.
    """
    given = os.environ.get(PATIENCE, str(DEFAULT_PATIENCE_S))
    if not given.isdigit() or int(given) < 1:
        raise ConfigError(f"{PATIENCE} is {given!r}", fix="give whole seconds, 1 or more")
    return int(given)


def no_answer(program: str, host: str, port: int, *, within_s: float) -> MachineError:
    return MachineError(
        f"{program}: the first node, {host}, did not answer on port {port} within {within_s:.0f} s",
        fix=f"see what {host} printed, and whether a firewall is between; {PATIENCE}=300 waits longer",
    )


def not_all_came(program: str, *, num_nodes: str) -> MachineError:
    return MachineError(
        f"{program}: not all of the {num_nodes} nodes came to the rendezvous in time",
        fix=f"see what the others printed; under SLURM {PATIENCE}=300 waits longer, else --rdzv-conf join_timeout=900",
    )


def lost_each_other(program: str, *, reason: str) -> MachineError:
    return MachineError(
        f"{program}: the nodes do not meet, or have lost each other: {reason}",
        fix="see which of them printed an error first, and whether the first one still runs",
    )
