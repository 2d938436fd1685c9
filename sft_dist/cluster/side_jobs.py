"""The jobs before and after the training: their scripts as text. Pure, like ``script``."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from sft_dist.cluster.header import Job, output_pattern
from sft_dist.cluster.script import Place, quoted, render, step_command, step_options
from sft_dist.cluster.time_limit import seconds_of_limit
from sft_dist.config.cluster_schema import ClusterConfig, PrepareJobConfig, ThenJobConfig
from sft_dist.errors import ConfigError

RUN = "{run}"


def render_prepare(cluster: ClusterConfig, place: Place, *, name: str, points: Sequence[str] = ()) -> str:
    """The script of the job that fetches the model and prepares the data.

    Args:
        name: of the job.
        points: names of a sweep's points, for all of which one job prepares.
    """
    job = _job(cluster, place, cluster.prepare, name=name, output="prepare-%j.out")
    return _script("prepare.sbatch.j2", cluster, place, cluster.prepare, job, points=points)


def render_then(
    cluster: ClusterConfig, place: Place, *, name: str, points: Sequence[str] = (), array: str | None = None
) -> str:
    """The script of the job that runs ``cluster.then.command``.

    Args:
        points: names of a sweep's points, in the order of the array's indices.
        array: its indices, as sbatch takes them.

    Raises:
        ConfigError: the command cannot be read.
    """
    asked = cluster.then
    assert asked is not None
    output = f"then-{'%A_%a' if points else '%j'}.out"
    job = _job(cluster, place, asked, name=name, output=output, gpus=asked.gpus, array=array)
    words = " ".join(map(_shell_word, words_of(asked.command)))
    return _script("then.sbatch.j2", cluster, place, asked, job, points=points, words=words)


def words_of(command: str) -> list[str]:
    """The words of ``cluster.then.command``, with ``{run}`` as it stands there.

    Raises:
        ConfigError: a quote is not closed, or there is no word.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigError(
            f"cluster.then.command: {command!r} cannot be read as a command ({str(error).lower()})",
            fix="write it as in a shell, e.g. 'export {run} --merge'",
        ) from None
    if not words:
        raise ConfigError("cluster.then.command is empty", fix="write e.g. 'export {run} --merge', or remove it")
    return words


def _shell_word(word: str) -> str:
    """With the variable of the script in place of ``{run}``."""
    parts = [quoted(part) if part else "" for part in word.split(RUN)]
    return '"$run"'.join(parts) if RUN in word else quoted(word)


def _job(
    cluster: ClusterConfig,
    place: Place,
    asked: PrepareJobConfig | ThenJobConfig,
    *,
    name: str,
    output: str,
    gpus: int = 0,
    array: str | None = None,
) -> Job:
    """One task on one node, which may simply begin again."""
    return Job(
        name=name,
        output=f"{output_pattern(place.run)}/slurm/{output}",
        nodes=1,
        tasks_per_node=1,
        cpus_per_task=asked.cpus,
        gpus_per_node=gpus,
        memory_gib=asked.memory_gib,
        time_limit_s=seconds_of_limit(asked.time_limit),
        signal_before_s=None,
        partition=asked.partition or cluster.partition,
        array=array,
    )


def _script(
    template: str, cluster: ClusterConfig, place: Place, asked: PrepareJobConfig | ThenJobConfig, job: Job, **more: Any
) -> str:
    there = _in_partition(cluster, asked.partition)
    return render(template, job, there, place, step=_step(cluster, place, job), **more)


def _in_partition(cluster: ClusterConfig, partition: str | None) -> ClusterConfig:
    """What is said of the training's nodes means nothing in another partition."""
    if partition is None or partition == cluster.partition:
        return cluster
    return cluster.model_copy(update={"qos": None, "constraint": None, "reservation": None, "gpu_type": None})


def _step(cluster: ClusterConfig, place: Place, job: Job) -> str:
    """Runs this program, in the container where there is one."""
    options = ["--ntasks=1", f"--cpus-per-task={job.cpus_per_task}", *step_options(cluster, place)]
    inside = [word for words in step_command(cluster, place, gpus=job.gpus_per_node > 0) for word in words]
    python = '"$python"' if cluster.container is None else "python3"
    return " ".join(["srun", *map(quoted, [*options, *inside]), python, "-m sft_dist"])
