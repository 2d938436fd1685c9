"""DeepSpeed's launcher for this project: ``python -m sft_dist.launch deepspeed [its options] train CONFIG [...]``.

DeepSpeed's runner starts the processes: itself on this machine, over ssh (or another way that it knows) on those of a
host file; in a SLURM step it runs on each node and needs no ssh. It is told to keep its log lines to itself, and its
exit code is read with those that the processes noted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sft_dist.errors import ConfigError
from sft_dist.launch.children import FORWARDED, Process, watched_children
from sft_dist.launch.command import MODULE, USAGE, WHAT_FOLLOWS, split_debug, start
from sft_dist.launch.meeting import (
    Meeting,
    choose_network,
    claim_port,
    meeting_of,
    step_of_launcher,
    tell_processes,
)
from sft_dist.launch.outcome import code_of_signal, exit_code, report_killed
from sft_dist.launch.wrong_words import refused
from sft_dist.runtime.failure import LAUNCH_FOLDER, noted_exit_codes
from sft_dist.runtime.network import free_port
from sft_dist.runtime.quiet import name_accelerator

name_accelerator()  # or DeepSpeed warns while it is imported

from deepspeed.launcher import runner  # noqa: E402

PROGRAM = "launch/deepspeed.sh"
DESCRIPTION = f"""\
usage: {PROGRAM} [deepspeed options] {USAGE}

Starts one process for each GPU (one process without any), or --num_gpus processes on each machine, GPUs or not, and
runs `sft-dist train CONFIG ...` in each. {WHAT_FOLLOWS}

DeepSpeed says of its options, where user_script stands for the command:
"""

NODE_LAUNCHER = "deepspeed.launcher.launch"

# The launcher of a machine that ends by signal N reports 256 - N, as every program does that exits with -N.
FIRST_SIGNAL_CODE = 192

Machines = dict[str, list[int]]  # what DeepSpeed will start: slots by name, in the order of ranks


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches a command and returns the exit code that says how it went.

    Args:
        arguments: options of ``deepspeed``, then a command of ``sft-dist`` with its arguments; those of this process by
            default.
    """
    words, debug = split_debug(arguments)
    if (code := refused("deepspeed", words, debug=debug)) is not None:
        return code
    sys.argv[0] = PROGRAM  # DeepSpeed's parser names it in what it says
    if words[0] in ("-h", "--help"):
        print(DESCRIPTION)
    options, command = _parse(words)
    given = words[: len(words) - len(command)]

    meeting: Meeting | None = None
    gpus: list[int] = []

    def prepare() -> int:
        nonlocal given, meeting, gpus
        meeting = _meeting_of_the_step(options, given)
        if meeting is None:
            chosen, count = _prepare(options, given)
        else:
            gpus = _gpus_of_a_node(options)
            chosen, count = [*_fixed_options(options, given), *_place_in_the_step(meeting, gpus)], len(gpus)
        given = [*given, *chosen]
        return count

    def launch(command: list[str]) -> int:
        arguments = [*given, MODULE, *command]
        if meeting is None:
            return _launch(arguments)
        claim_port(meeting)
        choose_network(meeting)
        tell_processes(PROGRAM)
        with _host_file(meeting, gpus) as path:
            return _launch(["--hostfile", path, *arguments])

    return start(command, debug=debug, prepare=prepare, launch=launch)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    options = runner.parse_args(arguments)
    return options, [options.user_script, *options.user_args]


def _meeting_of_the_step(options: argparse.Namespace, given: Sequence[str]) -> Meeting | None:
    """How the nodes of a SLURM step meet, where this runs on each of several; what the user said stays."""
    says_place = options.no_ssh or options.num_nodes == 1 or _is_given("--master_a", given)
    if says_place or Path(options.hostfile).is_file():
        return None
    step = step_of_launcher(PROGRAM)
    return None if step is None else meeting_of(step, program=PROGRAM)


def _gpus_of_a_node(options: argparse.Namespace) -> list[int]:
    try:
        _, machines = _this_machine(options)
    except ValueError as error:
        raise ConfigError(f"deepspeed's options: {error}", fix=f"see `{PROGRAM} --help`") from error
    (gpus,) = machines.values()
    return gpus


def _place_in_the_step(meeting: Meeting, gpus: Sequence[int]) -> list[str]:
    """Options that make DeepSpeed's launcher start the processes of this node, as one of several and without ssh.

    Args:
        gpus: of this node. Those of the others may have other numbers; only how many there are counts here.
    """
    step = meeting.step
    slots = [gpus if rank == step.node_rank else range(len(gpus)) for rank in range(step.num_nodes)]
    chosen = "@".join(f"{host}:{','.join(map(str, of_host))}" for host, of_host in zip(step.hosts, slots, strict=True))
    return [
        "--no_ssh", "--node_rank", str(step.node_rank),
        "--master_addr", meeting.host, "--master_port", str(meeting.port),
        "--num_gpus", "-1", "--num_nodes", "-1", "--exclude", "", "--include", chosen,
    ]  # fmt: skip


@contextmanager
def _host_file(meeting: Meeting, gpus: Sequence[int]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", prefix="sft_dist_hosts_") as file:
        slots = max(*gpus, len(gpus) - 1) + 1
        file.writelines(f"{host} slots={slots}\n" for host in meeting.step.hosts)
        file.flush()
        yield file.name


def _fixed_options(options: argparse.Namespace, given: Sequence[str]) -> list[str]:
    if options.no_python or options.autotuning:
        raise ConfigError(
            "--no_python and --autotuning have no meaning here", fix="leave them out: every process trains CONFIG"
        )
    added = ["--module", "--no_local_rank"]
    if not options.quiet and not _is_given("--log", given):
        added += ["--log_level", "critical"]
    return added


def _prepare(options: argparse.Namespace, given: Sequence[str]) -> tuple[list[str], int]:
    """Options to add to those ``given``, and the number of processes on this machine."""
    added = _fixed_options(options, given)
    try:
        if Path(options.hostfile).is_file():
            machines = _machines_of_the_host_file(options)
        else:
            chosen, machines = _this_machine(options)
            added += chosen
            if not _is_given("--master_p", given):
                added += ["--master_port", str(free_port())]
    except (OSError, ValueError) as error:
        raise ConfigError(f"deepspeed's options: {error}", fix=f"see `{PROGRAM} --help`") from error
    if options.no_ssh and not 0 <= options.node_rank < len(machines):
        raise ConfigError(
            f"--no_ssh needs --node_rank, from 0 to {len(machines) - 1}: it is {options.node_rank}",
            fix="start it on every machine of the host file, with its place there as --node_rank",
        )
    name = list(machines)[max(0, options.node_rank)]
    return added, len(machines[name])


def _is_given(prefix: str, given: Sequence[str]) -> bool:
    return any(word.startswith(prefix) for word in given)


def _machines_of_the_host_file(options: argparse.Namespace) -> Machines:
    """As DeepSpeed will choose them.

    Raises:
        ValueError: the file or the options that choose from it are wrong.
    """
    pool = runner.fetch_hostfile(options.hostfile)
    machines = runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
    machines = runner.apply_num_nodes_and_gpus(machines, options.num_nodes, options.num_gpus)
    if not machines:
        raise ValueError("--include and --exclude leave no machine")
    return dict(machines)


def _this_machine(options: argparse.Namespace) -> tuple[list[str], Machines]:
    """Options that make DeepSpeed start the processes of this machine, and their slots.

    Raises:
        ConfigError: fewer GPUs than processes.
        ValueError: as DeepSpeed raises.
    """
    # DeepSpeed ignores this variable beside any option about GPUs, and says so; other launchers choose among its GPUs.
    visible = os.environ.pop("CUDA_VISIBLE_DEVICES", "")
    num_gpus = torch.cuda.device_count()
    if options.include or options.exclude:
        pool = {"localhost": num_gpus or runner.get_accelerator().device_count()}
        machines = runner.parse_inclusion_exclusion(pool, options.include, options.exclude)
        if not machines:
            raise ValueError("--include and --exclude leave no GPU")
        return [], dict(machines)
    if num_gpus == 0:
        count = max(1, options.num_gpus)
        return ["--num_gpus", str(count)], {"localhost": list(range(count))}
    gpus = [int(number) for number in visible.split(",")] if visible else list(range(num_gpus))
    if options.num_gpus > len(gpus):
        raise ConfigError(f"--num_gpus is {options.num_gpus}, and there are {len(gpus)}", fix="start fewer processes")
    if options.num_gpus > 0:
        gpus = gpus[: options.num_gpus]
    # --include and numbers exclude each other: -1 takes them back.
    chosen = ["--num_gpus", "-1", "--num_nodes", "-1", "--include", f"localhost:{','.join(map(str, gpus))}"]
    return chosen, {"localhost": gpus}


def _starts_the_processes(process: Process) -> bool:
    """Whether this is DeepSpeed's launcher for one machine.

    Told to end, it kills the processes after 30 s, saved or not. They end by themselves, and it with them.
    """
    return isinstance(process.args, list) and NODE_LAUNCHER in process.args


def _launch(arguments: list[str]) -> int:
    # SIGHUP too: in a session of its own, the launcher does not see its terminal go.
    watched = watched_children(is_launcher=_starts_the_processes, numbers=(*FORWARDED, signal.SIGHUP))
    with tempfile.TemporaryDirectory(prefix="sft_dist_launch_") as folder, watched as children:
        os.environ[LAUNCH_FOLDER] = folder
        code = 0
        try:
            runner.main(arguments)
        except SystemExit as ended:
            code = int(ended.code or 0)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(f"deepspeed's options: {error}", fix=f"see `{PROGRAM} --help`") from error
        finally:
            del os.environ[LAUNCH_FOLDER]
        noted = noted_exit_codes(Path(folder))
        if code == 0:
            code = children.last_code  # the runner is silent about a launcher that a signal ended
    if code == 0:
        return 0
    # The launcher returns the code of the process that it saw first, which may be one that only lost its peer.
    if noted:
        return exit_code(noted)
    if code > FIRST_SIGNAL_CODE:
        code -= 256
    if code == 1 and children.signals:
        return code_of_signal(children.signals[0])
    if code < 0 and not children.signals:
        report_killed(-code)
    return exit_code({0: code})


if __name__ == "__main__":
    sys.exit(main())
