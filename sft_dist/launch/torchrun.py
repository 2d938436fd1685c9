"""``torchrun`` for this project: ``python -m sft_dist.launch.torchrun [torchrun options] train CONFIG [...]``.

It starts the processes with PyTorch's own elastic launcher and adds what a user of the command line expects of it:
a mistake in the configuration is answered before any process starts, a failure keeps its exit code and its two lines,
and the number of processes, their threads and the port have sensible values without being given.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch
from torch.distributed import run as torch_run

from sft_dist.errors import ConfigError
from sft_dist.launch.command import MODULE, USAGE, WHAT_FOLLOWS, split_debug, start
from sft_dist.launch.elastic import LOOPBACK, address_of_this_node, run_elastic

PROGRAM = "launch/torchrun.sh"
DESCRIPTION = f"""\
Starts one process for each GPU (one process without any) and runs `sft-dist train CONFIG ...` in each.
{WHAT_FOLLOWS}
On several nodes, run it on each with the same --nnodes, --rdzv-backend c10d and --rdzv-endpoint HOST:PORT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches a command and returns the exit code that says how it went.

    Args:
        arguments: torchrun's options, then a command of ``sft-dist`` with its arguments; those of this process by
            default.
    """
    given, debug = split_debug(arguments)
    options, command = _parse(given)

    def launch(command: list[str]) -> int:
        options.module, options.training_script, options.training_script_args = True, MODULE, command
        return run_elastic(lambda folder: _run(options, folder))

    return start(command, debug=debug, prepare=lambda: _prepare(options), launch=launch)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits torchrun's options from the command, with defaults for a single machine."""
    parser = torch_run.get_args_parser()
    parser.prog, parser.description = PROGRAM, DESCRIPTION
    parser.usage = f"%(prog)s [torchrun options] {USAGE}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest == "training_script":
            action.metavar, action.help = "train", "the command, followed by its own arguments"
        elif action.dest in ("training_script_args", "module", "no_python", "run_path"):
            action.help = argparse.SUPPRESS  # what runs in the processes is not for the user to choose here
    if "PET_NPROC_PER_NODE" not in os.environ:  # the environment variable through which torchrun takes this option
        parser.set_defaults(nproc_per_node=str(max(1, torch.cuda.device_count())))
    options = parser.parse_args(arguments)
    if options.no_python or options.run_path:
        parser.error("--no-python and --run-path have no meaning here: every process runs `python -m sft_dist`")
    command = [options.training_script, *options.training_script_args]
    options.standalone = options.standalone or _is_alone(options, arguments[: len(arguments) - len(command)])
    return options, command


def _is_alone(options: argparse.Namespace, given: Sequence[str]) -> bool:
    """Whether this is one machine with no word about how to meet: then any free port serves.

    Older versions of torchrun take port 29500 here, and a second run on the machine fails.
    """
    prefixes = ("--rdzv", "--master", "--node-rank", "--node_rank")
    variables = ("PET_RDZV", "PET_MASTER", "PET_NODE_RANK")
    named = any(option.startswith(prefixes) for option in given) or any(v.startswith(variables) for v in os.environ)
    return not named and options.nnodes in ("1", "1:1")


def _prepare(options: argparse.Namespace) -> int:
    try:
        torch_run.parse_min_max_nnodes(options.nnodes)
        count = torch_run.determine_local_world_size(options.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"torchrun's options: {error}", fix=f"see `{PROGRAM} --help`") from error
    if count < 1:
        raise ConfigError(f"--nproc-per-node is {count}", fix="start at least 1 process")
    if options.standalone:
        # Else each process looks up the machine's own name, which not every container can resolve.
        options.local_addr = options.local_addr or LOOPBACK
    elif options.rdzv_backend == "c10d" and options.rdzv_endpoint:
        options.local_addr = options.local_addr or address_of_this_node(options.rdzv_endpoint)
    return int(count)


def _run(options: argparse.Namespace, folder: str) -> None:
    options.log_dir = options.log_dir or folder
    torch_run.run(options)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
