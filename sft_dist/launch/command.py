"""What all launchers have in common: the command is checked in one process, before any other starts.

A launcher's module brings two functions: ``prepare`` completes the options and counts the processes of this machine,
``launch`` starts them and returns the exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from sft_dist.config.load import load_config
from sft_dist.config.validate import validate
from sft_dist.errors import SftError
from sft_dist.runtime.failure import report
from sft_dist.train.asked import NEVER
from sft_dist.train.preflight import preflight

MODULE = "sft_dist"  # what runs in every process: python -m sft_dist train ...
USAGE = "train CONFIG [--resume auto|PATH|never] [--rehearse] [--profile N] [KEY.PATH=VALUE ...]"
WHAT_FOLLOWS = (
    "What stands after the command belongs to it: a configuration file, --resume, --rehearse, --profile and "
    "key.path=value overrides."
)
RESUME, DRY_RUN, PROBE = "--resume", "--dry-run", "--probe"
# Other options of ``train``: those that a value follows, and those that stand alone.
WITH_VALUE = (RESUME, "--allow-change", "--profile")
REHEARSALS = ("--rehearse", "--rehearse-only")


def split_debug(arguments: Sequence[str] | None) -> tuple[list[str], bool]:
    """The command line without ``--debug``, which may stand anywhere in it, and whether it was there.

    Args:
        arguments: without the program's name; those of this process by default. Nothing asks for help.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    rest = [argument for argument in given if argument != "--debug"]
    return rest, len(rest) < len(given)


def start(
    command: Sequence[str], *, debug: bool, prepare: Callable[[], int], launch: Callable[[list[str]], int]
) -> int:
    """Checks a command, starts its processes and returns the exit code that says how it went.

    Args:
        command: of ``sft-dist``, with its arguments.
        debug: show the stack trace of an error, here and in the processes.
        prepare: completes the launcher's options; returns the number of processes on this machine.
        launch: runs the command that it is given in all processes.
    """
    arguments = [*command, "--debug"] if debug else list(command)
    try:
        if is_for_all_processes(command):
            return _launched(arguments, prepare, launch)
        _, rest = split_resume(command)
        if rest[:1] == ["train"] and DRY_RUN in rest:
            rest.remove(DRY_RUN)
            return subprocess.run([sys.executable, "-m", MODULE, *arguments, *_machines(rest, prepare)]).returncode
        if not runs_everywhere(command):
            # Help or a usage error: one process says it once.
            return subprocess.run([sys.executable, "-m", MODULE, *arguments]).returncode
        check_training(command)
        return _launched(arguments, prepare, launch)
    except SftError as error:
        report(error, debug=debug, words=command)
        return error.exit_code


def runs_everywhere(command: Sequence[str]) -> bool:
    """Whether a command runs in all processes; the others, help and mistakes of usage, run in one."""
    return is_for_all_processes(command) or _trains(_positionals(command))


def _trains(rest: Sequence[str]) -> bool:
    return rest[:1] == ["train"] and len(rest) > 1 and not any(word.startswith("-") for word in rest)


def _positionals(command: Sequence[str]) -> list[str]:
    return [word for word in split_resume(command)[1] if word not in REHEARSALS]


def check_training(command: Sequence[str]) -> None:
    """Finds what can be found wrong with a training before any process starts; looks at no other command.

    Raises:
        SftError: one of its kinds, as ``preflight`` and ``validate``.
    """
    rest = _positionals(command)
    if not _trains(rest):
        return
    config = load_config(rest[1], rest[2:])
    validate(config, source=rest[1])
    preflight(config, resume=split_resume(command)[0])


def is_for_all_processes(command: Sequence[str]) -> bool:
    """Whether a command other than ``train`` runs in all processes: ``resume``, ``eval``, ``lr-find`` and so on."""
    if "--help" in command:
        return False
    if command[0] == "plan":
        return any(word.partition("=")[0] == PROBE for word in command)
    return command[0] in ("calibrate", "doctor", "eval", "lr-find", "replay", "resume")


def _launched(arguments: list[str], prepare: Callable[[], int], launch: Callable[[list[str]], int]) -> int:
    num_processes = prepare()
    _share_cores(num_processes)
    print(f"starting {num_processes} process{'es' if num_processes > 1 else ''} on this machine", flush=True)
    return launch(arguments)


def _machines(rest: Sequence[str], prepare: Callable[[], int]) -> list[str]:
    """What a dry run is to be told of the processes that would be started: nothing where the configuration says it.

    Args:
        rest: ``train``, the configuration and overrides; with options a usage error, which the command itself tells.
    """
    if len(rest) == 1 or any(word.startswith("-") for word in rest):
        return []
    hardware = load_config(rest[1], rest[2:]).hardware
    return [] if hardware.gpus_per_node is not None else [f"hardware.gpus_per_node={prepare()}"]


def split_resume(command: Sequence[str]) -> tuple[str, list[str]]:
    """The value of ``--resume``, and the command without the options of ``train`` that a value follows.

    The last value counts; an option without one stays.
    """
    resume, rest = NEVER, []
    words = iter(command)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in WITH_VALUE:
            rest.append(word)
            continue
        following = value if equals else next(words, None)
        if following is None:
            rest.append(word)
        elif name == RESUME:
            resume = following
    return resume, rest


def _share_cores(num_processes: int) -> None:
    """Shares the cores among the processes; torchrun would give each a single thread, and warn about it."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
