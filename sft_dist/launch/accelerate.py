"""``accelerate launch`` for this project: ``python -m sft_dist.launch accelerate [its options] train CONFIG [...]``.

Accelerate's own parser and launch functions start the processes. What they tell them about strategy and precision in
the environment (``ACCELERATE_*``, ``FSDP_*``) arrives as it does from ``accelerate launch``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import DistributedType

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
from sft_dist.runtime.quiet import name_accelerator
from sft_dist.runtime.slurm_step import Step

PROGRAM = "launch/accelerate.sh"
DESCRIPTION = f"""\
Starts one process for each GPU (one process without any), or as many as --num_processes or the configuration file of
Accelerate says, and runs `sft-dist train CONFIG ...` in each. {WHAT_FOLLOWS}
Accelerate's options can be written with hyphens too."""

# Options that say what runs in a process, or start processes in a way that the trainer does not know.
MEANINGLESS = {
    "no_python": "--no_python",
    "tpu": "--tpu",
    "use_megatron_lm": "--use_megatron_lm",
    "mpirun_hostfile": "--mpirun_hostfile",
}
HIDDEN_GROUPS = ("TPU", "Megatron-LM Arguments", "AWS Arguments", "MPI Arguments")
SEE_HELP = f"see `{PROGRAM} --help`"


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches a command and returns the exit code that says how it went.

    Args:
        arguments: options of ``accelerate launch``, then a command of ``sft-dist`` with its arguments; those of this
            process by default.
    """
    given, debug = split_debug(arguments)
    if (code := refused("accelerate", given, debug=debug)) is not None:
        return code
    options, command = _parse(given)
    meeting: Meeting | None = None

    def prepare() -> int:
        nonlocal meeting
        file = _read_config_file(options)
        meeting = _meeting_of_the_step(options, file)
        return _prepare(options, file)

    return start(
        command, debug=debug, prepare=prepare, launch=lambda command: _launch(options, command, meeting=meeting)
    )


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = launch_command_parser()
    parser.prog, parser.description, parser.usage = PROGRAM, DESCRIPTION, f"%(prog)s [accelerate options] {USAGE}"
    for action in parser._actions:
        if action.dest == "training_script":
            action.metavar, action.help = "train", "the command, followed by its own arguments"
        elif action.dest in ("training_script_args", "module", "debug", "quiet", *MEANINGLESS):
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group.title in HIDDEN_GROUPS:
            for action in group._group_actions:
                action.help = argparse.SUPPRESS
    parser.set_defaults(local_addr=None)  # torchrun's, which Accelerate does not offer
    options = parser.parse_args(arguments)
    for name, option in MEANINGLESS.items():
        if getattr(options, name):
            parser.error(f"{option} has no meaning here")
    return options, [options.training_script, *options.training_script_args]


def _meeting_of_the_step(options: argparse.Namespace, file: ClusterConfig | None) -> Meeting | None:
    """On several nodes of a SLURM step: how they meet, and the options for it; what the command line says stays.

    Raises:
        ConfigError: the configuration file is for another number of machines.
    """
    if options.num_machines == 1 or any(
        value is not None for value in (options.machine_rank, options.main_process_ip, options.main_process_port)
    ):
        return None
    step = step_of_launcher(PROGRAM)
    if step is None or options.num_machines not in (None, step.num_nodes):
        return None
    meeting = meeting_of(step, program=PROGRAM)
    if options.num_processes is None:
        options.num_processes = step.num_nodes * _processes_of_a_machine(options, file, step)
    options.num_machines, options.machine_rank = step.num_nodes, step.node_rank
    options.main_process_ip, options.main_process_port = meeting.host, meeting.port
    options.rdzv_backend, options.rdzv_conf = "c10d", rendezvous_settings(options.rdzv_conf or "", meeting)
    # Handed through to torchrun, whose options Accelerate does not have.
    options.rdzv_id, options.local_addr = step.run_id, meeting.own_address
    # With --use_deepspeed: not over ssh from the first node, which is Accelerate's own choice.
    options.deepspeed_multinode_launcher = options.deepspeed_multinode_launcher or "standard"
    return meeting


def _processes_of_a_machine(options: argparse.Namespace, file: ClusterConfig | None, step: Step) -> int:
    """A file for one machine says how many each has; one for all of them, how many they have together."""
    count = None if file is None else file.num_processes
    if file is None or count in (None, -1):
        return 1 if options.cpu else max(1, _num_gpus(options.gpu_ids))
    machines = file.num_machines or 1
    if machines not in (1, step.num_nodes):
        raise ConfigError(
            f"the configuration file is for {machines} machines, and srun started this on {step.num_nodes}",
            fix="give a file with num_machines: 1, which serves any number of nodes, or start it on as many",
        )
    return int(count) // int(machines)


def _prepare(options: argparse.Namespace, file: ClusterConfig | None) -> int:
    """Gives every value that Accelerate would choose with a warning, and returns the processes of this machine."""
    for name in ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids"):
        if getattr(options, name) is None and file is not None:
            setattr(options, name, getattr(file, name))
    if options.num_processes in (None, -1):  # -1: a file that leaves it to the command line
        options.num_processes = 1 if options.cpu else max(1, _num_gpus(options.gpu_ids))
    options.num_machines = options.num_machines or 1
    if file is None:
        options.mixed_precision = options.mixed_precision or "no"
        options.dynamo_backend = options.dynamo_backend or "no"
    _choose_how_to_start(options, file)
    _choose_how_to_meet(options)
    if options.cpu or (file is not None and file.use_cpu):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the trainer takes a GPU where it sees one
    if options.num_cpu_threads_per_process is not None:
        # Accelerate passes it on under some strategies only.
        os.environ["OMP_NUM_THREADS"] = str(options.num_cpu_threads_per_process)
    name_accelerator()  # with --use_deepspeed, Accelerate imports DeepSpeed
    # It hides the exit code of a process.
    options.quiet = False
    return int(options.num_processes) // int(options.num_machines)


def _read_config_file(options: argparse.Namespace) -> ClusterConfig | None:
    """What ``accelerate launch`` will read: the file that was named, else the one that ``accelerate config`` wrote."""
    path = options.config_file or default_config_file
    if options.config_file is None and (options.cpu or not Path(path).is_file()):
        return None
    try:
        file = load_config_from_file(options.config_file)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: {reason}", fix="give a file that `accelerate config` could have written") from error
    if not isinstance(file, ClusterConfig):
        raise ConfigError(f"{path}: compute_environment is not LOCAL_MACHINE", fix="give a file for your own machines")
    if file.debug:
        raise ConfigError(f"{path}: with debug: true Accelerate calls a failed run done", fix="remove it, use --debug")
    return file


def _num_gpus(gpu_ids: str | None) -> int:
    return torch.cuda.device_count() if gpu_ids in (None, "all") else len(gpu_ids.split(","))


def _choose_how_to_start(options: argparse.Namespace, file: ClusterConfig | None) -> None:
    """Several processes are started, or this is an error: left alone, Accelerate starts one on a machine without GPUs.

    Raises:
        ConfigError: the numbers contradict each other.
    """
    count, machines = options.num_processes, options.num_machines
    if count < 1 or machines < 1 or count % machines:
        raise ConfigError(
            f"--num_processes is {count} and --num_machines {machines}",
            fix="--num_processes counts those of all machines, and every machine has the same number",
        )
    if count == 1:
        return
    if options.cpu:
        raise ConfigError(
            f"--cpu starts one process, and --num_processes is {count}",
            fix="leave --cpu out and say --multi_gpu: without GPUs the processes run on the CPU",
        )
    named = options.multi_gpu or options.use_fsdp or options.use_deepspeed
    if not named and (file is None or file.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)):
        options.multi_gpu = True


def _choose_how_to_meet(options: argparse.Namespace) -> None:
    """A free port on one machine; on several, this machine's own address.

    Raises:
        ConfigError: several machines, and no word about which this one is or where the first one is.
    """
    if options.num_machines == 1:
        options.main_process_port = options.main_process_port or 0
        options.local_addr = LOOPBACK
        return
    missing = [name for name in ("machine_rank", "main_process_ip") if getattr(options, name) is None]
    if missing:
        raise ConfigError(
            f"--num_machines is {options.num_machines}, and --{' and --'.join(missing)} not given",
            fix="give both, the same address of the first machine on every machine: --machine_rank 0 is that one",
        )
    if options.rdzv_backend == "c10d" and options.local_addr is None:
        # Handed through to torchrun, whose option Accelerate does not have.
        options.local_addr = address_of_this_node(_endpoint(options))


def _endpoint(options: argparse.Namespace) -> str:
    return f"{options.main_process_ip}:{options.main_process_port or 29500}"


def _launch(options: argparse.Namespace, command: list[str], *, meeting: Meeting | None) -> int:
    options.module, options.training_script, options.training_script_args = True, MODULE, command
    place = None
    if meeting is not None:
        claim_port(meeting)
        choose_network(meeting)
        await_first_node(meeting)
        place = NodePlace(meeting.step.node_rank, meeting.step.num_nodes)
    elif options.num_machines > 1 and options.rdzv_backend == "c10d":
        await_rendezvous(PROGRAM, _endpoint(options))
    try:
        return run_elastic(
            lambda folder: _run(options, folder), program=PROGRAM, place=place, num_nodes=str(options.num_machines)
        )
    except (ValueError, ConnectionError) as error:
        raise ConfigError(f"accelerate's options: {error}", fix=SEE_HELP) from error


def _run(options: argparse.Namespace, folder: str) -> None:
    options.log_dir = options.log_dir or folder
    launch_command(options)


if __name__ == "__main__":
    sys.exit(main())
