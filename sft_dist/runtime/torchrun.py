"""``torchrun`` for this project: ``python -m sft_dist.runtime.torchrun [torchrun options] train CONFIG [...]``.

It starts the processes with PyTorch's own elastic launcher and adds what a user of the command line expects of it:
a mistake in the configuration is answered before any process starts, a failure keeps its exit code and its two lines,
and the number of processes, their threads and the port have sensible values without being given.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.distributed import run as torch_run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from sft_dist.config.load import load_config
from sft_dist.config.validate import validate
from sft_dist.errors import ConfigError, SftError
from sft_dist.runtime.failure import report
from sft_dist.train.preflight import preflight

# Exit codes after which the process has already told the user what happened.
NAMED_EXIT_CODES = frozenset({2, 3, 4, 5, 6})
PREEMPTED_EXIT_CODE = 75
SIGTERM_EXIT_CODE = -15  # as multiprocessing reports a process that the launcher ended

# They say "failed (exitcode: ...)", "Sending process ... closing signal" and "Received 2 death signal" before anyone
# can know whether it matters.
LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")

DESCRIPTION = """\
Starts one process for each GPU (one process without any) and runs `sft-dist train CONFIG ...` in each.
What stands after the command belongs to it: a configuration file and key.path=value overrides.
On several nodes, run it on each with the same --nnodes, --rdzv-backend c10d and --rdzv-endpoint HOST:PORT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Launches a command and returns the exit code that says how it went.

    Args:
        arguments: torchrun's options, then a command of ``sft-dist`` with its arguments; those of this process by
            default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    options, command = _parse([argument for argument in given if argument != "--debug"])
    options.module, options.training_script = True, "sft_dist"
    options.training_script_args = [*command, "--debug"] if debug else command
    if command[0] != "train" or len(command) == 1 or any(word.startswith("-") for word in command):
        # Help or a usage error: one process says it once.
        return subprocess.run([sys.executable, "-m", "sft_dist", *options.training_script_args]).returncode
    try:
        config = load_config(command[1], command[2:])
        validate(config, source=command[1])
        preflight(config)
        num_processes = _processes_per_node(options)
    except SftError as error:
        report(error, debug=debug)
        return error.exit_code
    _set_thread_count(num_processes)
    print(f"starting {num_processes} process{'es' if num_processes > 1 else ''} on this machine", flush=True)
    return _launch(options)


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits torchrun's options from the command, with defaults for a single machine."""
    parser = torch_run.get_args_parser()
    parser.prog, parser.description = "launch/torchrun.sh", DESCRIPTION
    parser.usage = "%(prog)s [torchrun options] train CONFIG [KEY.PATH=VALUE ...]"
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
    if options.standalone:
        # Else each process looks up the machine's own name, which not every container can resolve.
        options.local_addr = options.local_addr or "127.0.0.1"
    return options, command


def _is_alone(options: argparse.Namespace, given: Sequence[str]) -> bool:
    """Whether this is one machine with no word about how to meet: then any free port serves.

    Older versions of torchrun take port 29500 here, and a second run on the machine fails.
    """
    prefixes = ("--rdzv", "--master", "--node-rank", "--node_rank")
    variables = ("PET_RDZV", "PET_MASTER", "PET_NODE_RANK")
    named = any(option.startswith(prefixes) for option in given) or any(v.startswith(variables) for v in os.environ)
    return not named and options.nnodes in ("1", "1:1")


def _processes_per_node(options: argparse.Namespace) -> int:
    try:
        torch_run.parse_min_max_nnodes(options.nnodes)
        count = torch_run.determine_local_world_size(options.nproc_per_node)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"torchrun's options: {error}", fix="see `launch/torchrun.sh --help`") from error
    if count < 1:
        raise ConfigError(f"--nproc-per-node is {count}", fix="start at least 1 process")
    return int(count)


def _set_thread_count(num_processes: int) -> None:
    """Shares the cores among the processes; torchrun would give each a single thread, and warn about it."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))


def _launch(options: argparse.Namespace) -> int:
    # torchrun makes a folder for error files in the system's temporary folder and leaves it there.
    with tempfile.TemporaryDirectory(prefix="sft_dist_launch_") as folder, _held_back(LOGGERS) as held:
        options.log_dir = options.log_dir or folder
        try:
            torch_run.run(options)  # type: ignore[no-untyped-call]
        except ChildFailedError as error:
            code = exit_code({rank: failure.exitcode for rank, failure in error.failures.items()})
            killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
            killed = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
            if code in NAMED_EXIT_CODES or code == PREEMPTED_EXIT_CODE:
                held.clear()
            elif killed:
                held.clear()
                report(_killed(killed), debug=False)
            else:
                print(error, file=sys.stderr)
            return code
        except SignalException as error:
            held.clear()
            return 128 + int(error.sigval)
    return 0


def _killed(signals: Mapping[int, int]) -> SftError:
    """Says which process a signal ended; what its peers printed about a lost connection is the consequence."""
    rank = min(signals)
    return SftError(
        f"rank {rank} was ended by {signal.Signals(signals[rank]).name}, and the run with it",
        fix="if nobody sent it, memory ran out: see `dmesg`, then lower train.micro_batch_size or data.max_seq_len",
    )


def exit_code(by_rank: Mapping[int, int]) -> int:
    """The exit code of a launch from those of its failed processes.

    A named failure is the cause and an unnamed one beside it the consequence: a process that finds its peer gone fails
    in a collective with code 1. "Preempted" counts only if nothing else happened, since a process that the launcher
    ends because another one failed may say so too, and the job must not be put back into the queue then.

    Args:
        by_rank: exit codes other than 0 by global rank; negative where a signal ended the process.

    Returns:
        The code of the lowest rank among those that count; 128 + signal where a signal ended it.
    """
    causes = {rank: code for rank, code in by_rank.items() if code != SIGTERM_EXIT_CODE}
    named = {rank: code for rank, code in causes.items() if code in NAMED_EXIT_CODES}
    unnamed = {rank: code for rank, code in causes.items() if code != PREEMPTED_EXIT_CODE}
    counting = named or unnamed or causes or by_rank
    code = counting[min(counting)]
    return code if code > 0 else 128 - code


@contextmanager
def _held_back(names: Sequence[str]) -> Iterator[list[logging.LogRecord]]:
    """Keeps loggers' records until the end, when those still in the yielded list are logged."""
    loggers = [logging.getLogger(name) for name in names]
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    for logger in loggers:
        logger.addFilter(hold)
    try:
        yield held
    finally:
        for logger in loggers:
            logger.removeFilter(hold)
        for record in held:
            logging.getLogger(record.name).handle(record)


if __name__ == "__main__":
    sys.exit(main())
