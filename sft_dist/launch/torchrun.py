"""``torchrun`` for this project: ``python -m sft_dist.launch torchrun [torchrun options] train CONFIG [...]``.

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
from sft_dist.launch.agent import NodePlace
from sft_dist.launch.command import MODULE, USAGE, WHAT_FOLLOWS, split_debug, start
from sft_dist.launch.elastic import (
    LOOPBACK,
    address_of_this_node,
    await_rendezvous,
    rendezvous_settings,
    run_elastic,
)
from sft_dist.launch.meeting import (
    Meeting,
    await_first_node,
    choose_network,
    claim_port,
    meeting_of,
    step_of_launcher,
)
from sft_dist.launch.wrong_words import refused

PROGRAM = "launch/torchrun.sh"
DESCRIPTION = f"""\
Starts one process for each GPU (one process without any) and runs `sft-dist train CONFIG ...` in each.
{WHAT_FOLLOWS}
On several nodes, start it by srun with one task a node; or on each with the same --nnodes, --rdzv-backend c10d and
--rdzv-endpoint HOST:PORT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches a command and returns the exit code that says how it went.

    Args:
        arguments: torchrun's options, then a command of ``sft-dist`` with its arguments; those of this process by
            default.
    """
    given, debug = split_debug(arguments)
    if (code := refused("torchrun", given, debug=debug)) is not None:
        return code
    options, command = _parse(given)
    meeting: Meeting | None = None

    def prepare() -> int:
        nonlocal meeting
        meeting = _meeting_of_the_step(options)
        return _prepare(options)

    def launch(command: list[str]) -> int:
        options.module, options.training_script, options.training_script_args = True, MODULE, command
        place = None
        if meeting is not None:
            claim_port(meeting)
            choose_network(meeting)
            await_first_node(meeting)
            place = NodePlace(meeting.step.node_rank, meeting.step.num_nodes)
        elif not options.standalone and options.rdzv_backend == "c10d" and options.rdzv_endpoint:
            await_rendezvous(PROGRAM, options.rdzv_endpoint)
        return run_elastic(lambda folder: _run(options, folder), program=PROGRAM, place=place, num_nodes=options.nnodes)

    return start(command, debug=debug, prepare=prepare, launch=launch)


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
    given = arguments[: len(arguments) - len(command)]
    options.says_nnodes = _is_said(given, ("--nnodes",), ("PET_NNODES",))
    options.says_meeting = options.standalone or _is_said(
        given,
        ("--rdzv-e", "--rdzv_e", "--rdzv-b", "--rdzv_b", "--rdzv-id", "--rdzv_id", "--master", "--node-r", "--node_r"),
        ("PET_RDZV_E", "PET_RDZV_B", "PET_RDZV_ID", "PET_MASTER", "PET_NODE_RANK"),
    )
    return options, command


def _is_said(given: Sequence[str], prefixes: tuple[str, ...], variables: tuple[str, ...]) -> bool:
    """Whether the user chose something, by an option or in the environment."""
    return any(option.startswith(prefixes) for option in given) or any(v.startswith(variables) for v in os.environ)


def _meeting_of_the_step(options: argparse.Namespace) -> Meeting | None:
    """On several nodes of a SLURM step: how they meet, and the options for it; what the user said stays."""
    is_single = options.nnodes in ("1", "1:1")
    if options.says_meeting or (options.says_nnodes and is_single):
        return None
    step = step_of_launcher(PROGRAM)
    if step is None:
        return None
    meeting = meeting_of(step, program=PROGRAM)
    if not options.says_nnodes:
        options.nnodes = str(step.num_nodes)
    options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id = "c10d", meeting.endpoint, step.run_id
    options.rdzv_conf = rendezvous_settings(options.rdzv_conf, meeting)
    options.local_addr = options.local_addr or meeting.own_address
    return meeting


def _prepare(options: argparse.Namespace) -> int:
    try:
        torch_run.parse_min_max_nnodes(options.nnodes)
        count = torch_run.determine_local_world_size(options.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"torchrun's options: {error}", fix=f"see `{PROGRAM} --help`") from error
    if count < 1:
        raise ConfigError(f"--nproc-per-node is {count}", fix="start at least 1 process")
    # One machine with no word about how to meet: any free port serves. Older versions of torchrun take port 29500 here,
    # and a second run on the machine fails.
    options.standalone |= not options.says_meeting and not options.rdzv_endpoint and options.nnodes in ("1", "1:1")
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
