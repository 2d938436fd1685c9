"""Plain ``srun``, without a launcher: ``python -m sft_dist.launch srun train CONFIG [...]`` in every task of a step.

Each task is one of the processes that train. SLURM's signals reach it directly, and its exit code is the task's.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from sft_dist.errors import ConfigError, Preempted, SftError
from sft_dist.launch.command import MODULE, USAGE, WHAT_FOLLOWS, check_training, runs_everywhere, split_debug
from sft_dist.launch.meeting import Meeting, choose_network, claim_port, meeting_of, tell_processes
from sft_dist.runtime.failure import LAUNCH_FOLDER, report
from sft_dist.runtime.slurm_step import Step, step_from_environment

PROGRAM = "launch/srun.sh"
DESCRIPTION = f"""\
usage: srun --ntasks-per-node=N {PROGRAM} {USAGE}

Every task of the step is one process of the training: one for each GPU, as many on each node. {WHAT_FOLLOWS}"""

GONE = "gone-"  # in the folder that the tasks of a node share: a file for each of them that has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains in this task, and returns the exit code.

    Args:
        arguments: a command of ``sft-dist`` with its arguments; those of this process by default.
    """
    command, debug = split_debug(arguments)
    if command[0] in ("-h", "--help"):
        print(DESCRIPTION)
        return 0
    signal.signal(signal.SIGUSR1, _leave)
    try:
        step = _step()
    except SftError as error:
        if os.environ.get("SLURM_PROCID", "0") == "0":
            report(error, debug=debug)
        return error.exit_code
    if not runs_everywhere(command):
        # Help or a mistake of usage: one task says it once.
        return _run(command) if step.is_first else 0
    words = [*command, "--debug"] if debug else command
    with _shared_folder(step) as folder:
        try:
            meeting = _checked(step, command)
        except SftError as error:
            # As one of the processes, of which one speaks for all of this node.
            os.environ.update(_place(step) | {LAUNCH_FOLDER: str(folder)})
            report(error, debug=debug)
            return error.exit_code
        os.environ.update(_place(step) | _address(meeting) | {LAUNCH_FOLDER: str(folder)})
        return _run(words)


def _leave(_number: int, _frame: FrameType | None) -> NoReturn:
    """Before training there is nothing to save; while it lasts, the trainer listens itself."""
    sys.exit(Preempted.exit_code)


def _step() -> Step:
    """The step that this is a task of.

    Raises:
        ConfigError: there is none, or its tasks cannot be processes of one training.
    """
    step = step_from_environment()
    if step is None:
        raise ConfigError(
            f"{PROGRAM} was not started by srun",
            fix=f"srun --ntasks-per-node=N {PROGRAM} ..., a task for each process; without SLURM: launch/torchrun.sh",
        )
    if len(set(step.tasks_per_node)) > 1:
        counts = ", ".join(f"{host}: {count}" for host, count in zip(step.hosts, step.tasks_per_node, strict=True))
        raise ConfigError(
            f"{PROGRAM}: the nodes have different numbers of tasks ({counts})",
            fix="give srun --ntasks-per-node=N in place of --ntasks",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and len(visible.split(",")) < step.num_tasks_here:
        raise ConfigError(
            f"{PROGRAM}: {step.num_tasks_here} tasks on a node, and this one may use the GPUs {visible} only",
            fix="give the node's GPUs to all of its tasks: --gpus-per-node=N, and no --gpus-per-task or --gpu-bind",
        )
    return step


def _checked(step: Step, command: Sequence[str]) -> Meeting:
    """What the first task finds wrong ends the run before the others have loaded anything expensive."""
    if step.is_first:
        check_training(command)
    meeting = meeting_of(step, program=PROGRAM)
    if step.is_first:
        claim_port(meeting)
        many = step.num_tasks_here
        print(f"starting {many} process{'es' if many > 1 else ''} on each node, by srun", flush=True)
    if step.num_nodes > 1:
        choose_network(meeting)
    tell_processes(PROGRAM)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(step)))
    return meeting


def _threads(step: Step) -> int:
    """Cores for this task: its own where SLURM binds tasks to cores, else its share of the node's."""
    usable = len(os.sched_getaffinity(0))
    of_the_job = int(os.environ.get("SLURM_CPUS_ON_NODE", usable))
    return usable if usable < of_the_job else max(1, min(usable, of_the_job) // step.num_tasks_here)


def _place(step: Step) -> dict[str, str]:
    """Ranks count along the nodes, whatever --distribution says: processes of a node are neighbours."""
    count = step.num_tasks_here
    return {
        "RANK": str(step.node_rank * count + step.local_task),
        "WORLD_SIZE": str(step.num_nodes * count),
        "LOCAL_RANK": str(step.local_task),
        "LOCAL_WORLD_SIZE": str(count),
    }


def _address(meeting: Meeting) -> dict[str, str]:
    return {"MASTER_ADDR": meeting.host, "MASTER_PORT": str(meeting.port)}


@contextmanager
def _shared_folder(step: Step) -> Iterator[Path]:
    """For the tasks of this node. The last of them to end removes it, when all have been there: one that begins later
    than another ends finds what that one said."""
    # Nodes may share the place of temporary files, too.
    name = f"sft_dist_launch_{os.getuid()}_{step.run_id}_{step.node_rank}"
    folder = Path(tempfile.gettempdir()) / name
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        yield folder
    finally:
        (folder / f"{GONE}{step.local_task}").touch()
        if all((folder / f"{GONE}{task}").exists() for task in range(step.num_tasks_here)):
            shutil.rmtree(folder, ignore_errors=True)  # another one may see the same at the same time


def _run(words: Sequence[str]) -> int:
    """``python -m sft_dist`` in this process."""
    # As launchers start Python: a line is shown when it is printed, also if the process then ends at once.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = [MODULE, *words]
    try:
        runpy.run_module(MODULE, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
