"""Mistakes in a launcher's own words that its parser would answer with a page: an option that another launcher has for
the same thing, and a command without its name.
"""

from __future__ import annotations

from collections.abc import Sequence

from sft_dist.errors import ConfigError
from sft_dist.runtime.failure import report

# What each launcher calls the same thing, by the names of their scripts.
NAMES: tuple[dict[str, str], ...] = (
    {"torchrun": "--nproc-per-node", "accelerate": "--num_processes", "deepspeed": "--num_gpus"},
    {"torchrun": "--nnodes", "accelerate": "--num_machines", "deepspeed": "--num_nodes"},
    {"torchrun": "--node-rank", "accelerate": "--machine_rank", "deepspeed": "--node_rank"},
    {"torchrun": "--master-addr", "accelerate": "--main_process_ip", "deepspeed": "--master_addr"},
    {"torchrun": "--master-port", "accelerate": "--main_process_port", "deepspeed": "--master_port"},
)
# The number of all processes for accelerate, that of a machine for the others.
REMARKS = {"--num_processes": " (of all machines together)", "--nproc-per-node": " (of each machine)"}


def refused(launcher: str, words: Sequence[str], *, debug: bool) -> int | None:
    """The exit code, after the mistake has been told; None where there is none of this kind.

    Args:
        launcher: ``torchrun``, ``accelerate`` or ``deepspeed``.
        words: its options, then a command with its arguments.
    """
    try:
        _check(launcher, words)
    except ConfigError as error:
        report(error, debug=debug)
        return error.exit_code
    return None


def _check(launcher: str, words: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the words have one of these mistakes.
    """
    script, own = f"launch/{launcher}.sh", {_plain(names[launcher]) for names in NAMES}
    for place, word in enumerate(words):
        if word == "train":
            return
        name = _plain(word)
        for names in NAMES if word.startswith("--") and name not in own else ():
            if name in map(_plain, names.values()):
                here = names[launcher]
                raise ConfigError(
                    f"{script} has no option {word.partition('=')[0]}",
                    fix=f"it is called {here} here{REMARKS.get(here, '')}; `{script} --help` lists all of them",
                )
        is_value = place > 0 and words[place - 1].startswith("--") and "=" not in words[place - 1]
        if word.endswith((".yaml", ".yml")) and not word.startswith("-") and not is_value:
            before = "".join(f"{each} " for each in words[:place])
            raise ConfigError(
                f"{script}: {word} stands where the command belongs",
                fix=f"write train before it: {script} {before}train {' '.join(words[place:])}",
            )
        if not word.startswith("-") and not is_value:
            return  # another command, which tells of its own mistakes


def _plain(option: str) -> str:
    """``--nproc_per_node`` for ``--nproc-per-node=2``."""
    return option.partition("=")[0].replace("-", "_").replace("__", "--", 1)
