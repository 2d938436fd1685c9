"""Cross-checks of the keys of ``cluster``. Reads, never changes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from sft_dist.config.cluster_schema import ClusterConfig, ContainerConfig
from sft_dist.config.schema import Config

# What the script says of itself, by option of sbatch: the keys that say it in its place.
OWN_OPTIONS = {
    ("--job-name", "-J"): "output_dir, whose last part is the name",
    ("--output", "-o"): "output_dir",
    ("--nodes", "-N"): "hardware.nodes",
    ("--ntasks", "-n"): "hardware.gpus_per_node and cluster.launcher",
    ("--ntasks-per-node",): "hardware.gpus_per_node and cluster.launcher",
    ("--cpus-per-task", "-c"): "cluster.cpus_per_gpu",
    ("--cpus-per-gpu",): "cluster.cpus_per_gpu",
    ("--gpus-per-node", "--gpus", "-G", "--gres", "--gpus-per-task"): "hardware.gpus_per_node and cluster.request_gpus",
    ("--mem", "--mem-per-cpu", "--mem-per-gpu"): "cluster.memory_gib",
    ("--time", "-t"): "cluster.time_limit",
    ("--signal",): "cluster.signal_before_s",
    ("--partition", "-p"): "cluster.partition",
    ("--account", "-A"): "cluster.account",
    ("--qos", "-q"): "cluster.qos",
    ("--constraint", "-C"): "cluster.constraint",
    ("--reservation",): "cluster.reservation",
    ("--exclude", "-x"): "cluster.exclude",
    ("--requeue", "--no-requeue"): "cluster.max_restarts",
}
# Those that have no key: the script or the command could not do its work with them.
REFUSED_OPTIONS = (
    "--open-mode",
    "--chdir",
    "-D",
    "--array",
    "-a",
    "--dependency",
    "-d",
    "--export",
    "--wrap",
    "--wait",
)
OWN_VARIABLES = ("HF_HUB_OFFLINE", "PYTHONPATH", "SFT_DIST_JOB_NOTES")
MOUNT = re.compile(r"[^:,]+:/[^:,]*(:[^:,]+)?")

Finding = tuple[str, str]  # (what is wrong, how to fix it), each one line


def cluster_findings(config: Config) -> Iterator[Finding]:
    """What is wrong with ``cluster`` that can be seen in the configuration alone."""
    cluster = config.cluster
    yield from _without_effect(cluster)
    yield from _one_line(cluster)
    yield from _options(cluster.options)
    yield from _environment(cluster.environment)
    if cluster.container is not None:
        yield from _container(cluster.container)


def _without_effect(cluster: ClusterConfig) -> Iterator[Finding]:
    if cluster.gpu_type is not None and cluster.request_gpus == "none":
        yield (
            f"cluster.gpu_type is {cluster.gpu_type}, which has no effect with cluster.request_gpus none",
            "remove cluster.gpu_type, or set cluster.request_gpus to gpus-per-node or gres",
        )
    if cluster.then is not None and cluster.then.gpus and cluster.request_gpus == "none":
        yield (
            f"cluster.then.gpus is {cluster.then.gpus}, which has no effect with cluster.request_gpus none",
            "remove cluster.then.gpus, or set cluster.request_gpus to gpus-per-node or gres",
        )
    if cluster.time_limit is not None and cluster.time_margin != ClusterConfig.model_fields["time_margin"].default:
        yield (
            f"cluster.time_margin is {cluster.time_margin:g}, which has no effect with cluster.time_limit",
            "remove one of them",
        )


def _one_line(cluster: ClusterConfig) -> Iterator[Finding]:
    """Names stand in a comment that sbatch reads: a line break would end it."""
    names: dict[str, str | None] = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "gpu_type": cluster.gpu_type,
        "prepare.partition": cluster.prepare.partition,
        "then.partition": None if cluster.then is None else cluster.then.partition,
    }
    names |= {f"exclude.{i}": name for i, name in enumerate(cluster.exclude)}
    names |= {f"options.{i}": option for i, option in enumerate(cluster.options)}
    names |= {f"modules.{i}": module for i, module in enumerate(cluster.modules)}
    for key, name in names.items():
        if name is not None and not name.strip():
            yield f"cluster.{key} is empty", f"set cluster.{key}, or remove it"
        elif name is not None and len(name.splitlines()) > 1:
            yield f"cluster.{key} is more than one line", f"write cluster.{key} in one line"


def _options(options: list[str]) -> Iterator[Finding]:
    for option in options:
        name = re.split(r"[=\s]", option.strip(), maxsplit=1)[0]
        short = name[:2] if re.fullmatch(r"-[A-Za-z].*", name) else name
        key = next((key for names, key in OWN_OPTIONS.items() if short in names), None)
        if not name.startswith("-"):
            yield (
                f"cluster.options has {option!r}, which is no option of sbatch",
                "write the option and its value as one entry, e.g. --nice=100",
            )
        elif key is not None:
            yield f"cluster.options has {option}, which the script says itself", f"remove it, and set {key}"
        elif short in REFUSED_OPTIONS:
            yield f"cluster.options has {option}, with which the job would not work", "remove it"


def _environment(environment: dict[str, str]) -> Iterator[Finding]:
    for name in environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            yield f"cluster.environment has {name!r}, which is no name of a variable", "correct it"
        elif name in OWN_VARIABLES or name.startswith("SLURM_"):
            yield f"cluster.environment has {name}, which the job sets itself", f"remove {name}"


def _container(container: ContainerConfig) -> Iterator[Finding]:
    for i, mount in enumerate(container.mounts):
        if not MOUNT.fullmatch(mount):
            yield (
                f"cluster.container.mounts.{i} is {mount!r}",
                "write SOURCE:TARGET, e.g. /scratch/data:/data; TARGET begins with /",
            )
    if len(container.image.splitlines()) > 1:
        yield "cluster.container.image is more than one line", "write cluster.container.image in one line"
