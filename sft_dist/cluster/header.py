"""The ``#SBATCH`` lines of a job: what SLURM is asked for. Pure text; every job's script begins with these."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from sft_dist.cluster.resources import Resources
from sft_dist.cluster.time_limit import limit_of_seconds
from sft_dist.config.cluster_schema import ClusterConfig

BARE = re.compile(r"[A-Za-z0-9_./,:=@%+&|*()\[\]-]+")


@dataclass(frozen=True)
class Job:
    """What one job asks for; None: the cluster's default.

    Args:
        gpus_per_node: 0 for none.
        memory_gib: of a node.
        signal_before_s: None: no signal before the limit.
        output: file of its output, with sbatch's patterns such as ``%j``.
        further: options as the user writes them, e.g. ``--nice=100``.
        array: indices of an array of such jobs, e.g. ``0-7%2`` for at most two at once.
    """

    name: str
    output: str
    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    memory_gib: float
    time_limit_s: int
    signal_before_s: int | None
    partition: str | None
    further: tuple[str, ...] = ()
    array: str | None = None


def training_job(
    cluster: ClusterConfig, resources: Resources, *, name: str, output: str, array: str | None = None
) -> Job:
    """The job that trains."""
    return Job(
        name=name,
        output=output,
        nodes=resources.nodes,
        tasks_per_node=resources.tasks_per_node,
        cpus_per_task=resources.cpus_per_task,
        gpus_per_node=0 if cluster.request_gpus == "none" else resources.gpus_per_node,
        memory_gib=resources.memory_gib,
        time_limit_s=resources.time_limit_s,
        signal_before_s=resources.signal_before_s,
        partition=cluster.partition,
        further=tuple(cluster.options),
        array=array,
    )


def sbatch_options(job: Job, cluster: ClusterConfig) -> list[str]:
    """Options of sbatch, each as it stands behind ``#SBATCH``."""
    return [quoted_option(*option) for option in _options(job, cluster)] + list(job.further)


def _options(job: Job, cluster: ClusterConfig) -> Iterator[tuple[str, str | None]]:
    yield "job-name", job.name
    if job.array is not None:
        yield "array", job.array
    yield "nodes", str(job.nodes)
    yield "ntasks-per-node", str(job.tasks_per_node)
    yield "cpus-per-task", str(job.cpus_per_task)
    if job.gpus_per_node:
        kind = "" if cluster.gpu_type is None else f"{cluster.gpu_type}:"
        gres = cluster.request_gpus == "gres"
        yield ("gres", f"gpu:{kind}{job.gpus_per_node}") if gres else ("gpus-per-node", f"{kind}{job.gpus_per_node}")
    yield "mem", f"{math.ceil(job.memory_gib)}G"
    yield "time", limit_of_seconds(job.time_limit_s)
    if job.signal_before_s is not None:
        # To the steps: with B: it would reach the script alone.
        yield "signal", f"USR1@{job.signal_before_s}"
    yield "requeue", None
    yield "open-mode", "append"
    yield "output", job.output
    named = {
        "partition": job.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "exclude": ",".join(cluster.exclude) or None,
    }
    yield from ((name, value) for name, value in named.items() if value is not None)


def quoted_option(name: str, value: str | None) -> str:
    """``--name=value``, quoted for sbatch: it takes a backslash for an escape within single quotes too."""
    if value is None:
        return f"--{name}"
    if BARE.fullmatch(value):
        return f"--{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'--{name}="{escaped}"'


def output_pattern(path: str) -> str:
    """A path for ``--output``, in which sbatch looks for patterns such as ``%j``."""
    return path.replace("%", "%%")
