"""A job's script as text, from the templates in ``slurm/``. Pure: the same arguments give the same script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from sft_dist.cluster.header import Job, output_pattern, sbatch_options, training_job
from sft_dist.cluster.resources import Resources
from sft_dist.cluster.time_limit import limit_of_seconds
from sft_dist.config.cluster_schema import ClusterConfig
from sft_dist.config.schema import Config
from sft_dist.config.validate_cluster import OWN_VARIABLES

# The editable copies stand in slurm/ of the checkout.
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Place:
    """Where a submission is: every path is absolute.

    Args:
        python: of the environment that it was submitted from.
        checkout: folder of this project's code; None: it is installed.
        directory: where it was submitted: paths in the configuration count from there.
        run: ``output_dir``; submission: the folder in it that the job runs from.
    """

    python: str
    checkout: str | None
    directory: str
    run: str
    submission: str


def render_train(
    config: Config,
    resources: Resources,
    place: Place | None,
    *,
    name: str,
    points: Sequence[str] = (),
    array: str | None = None,
    about: Mapping[str, str] | None = None,
) -> str:
    """The script of the job that trains.

    Args:
        config: of a sweep any point's: it reads what all points share.
        place: None: a script for every CONFIG, to be submitted from the checkout by hand.
        name: of the job.
        about: without a place: ``recipe`` and ``data`` that its resources are planned for.
        points: names of a sweep's points, in the order of the array's indices; ``array``: these, as sbatch takes them.
    """
    cluster, job = config.cluster, "%A_%a" if points else "%j"
    output = "%x-%j.out" if place is None else f"{output_pattern(place.run)}/slurm/train-{job}.out"
    return render(
        "train.sbatch.j2",
        training_job(cluster, resources, name=name, output=output, array=array),
        cluster,
        place,
        points=points,
        resources=resources,
        about=about,
        why=resource_lines(resources),
        launch_options=_launch_options(config, resources),
        python_of_steps='"$python"' if cluster.container is None else "python3",
        step_options=step_options(cluster, place),
        step_command=step_command(cluster, place, gpus=cluster.request_gpus != "none"),
    )


def render(template: str, job: Job, cluster: ClusterConfig, place: Place | None, **values: object) -> str:
    """A script from one of the templates.

    Args:
        values: of the template, beside ``options`` (of sbatch), ``job``, ``cluster`` and ``place``.
    """
    found = _environment().get_template(template)
    return found.render(options=sbatch_options(job, cluster), job=job, cluster=cluster, place=place, **values)


def quoted(value: str) -> str:
    """A word for the shell; with commas in quotes too, where a reader may take them for something else."""
    return f"'{value}'" if shlex.quote(value) == value and "," in value else shlex.quote(value)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # shell, not HTML: every value goes through `quoted`
    )
    environment.filters["quoted"] = quoted
    return environment


def resource_rows(resources: Resources) -> list[tuple[str, str, str]]:
    """What is asked for, how much of it, and why, for people."""
    reasons = resources.reasons
    rows = [
        ("nodes", str(resources.nodes), reasons["nodes"]),
        (resources.unit, f"{resources.gpus_per_node} a node", reasons["gpus_per_node"]),
        ("tasks", f"{resources.tasks_per_node} a node", reasons["tasks_per_node"]),
        ("CPUs", f"{resources.cpus_per_task} a task", reasons["cpus_per_task"]),
        ("memory", f"{resources.memory_gib} GiB a node", reasons["memory_gib"]),
        ("time limit", limit_of_seconds(resources.time_limit_s), reasons["time_limit_s"]),
        ("signal", f"{resources.signal_before_s} s before", reasons["signal_before_s"]),
    ]
    if resources.starts is not None:
        rows.append(("starts", str(resources.starts), reasons["starts"]))
    return rows


def resource_lines(resources: Resources) -> list[str]:
    """The same in columns, a line each."""
    rows = resource_rows(resources)
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    return [f"{name:{first}}  {amount:{second}}  {reason}" for name, amount, reason in rows]


def _launch_options(config: Config, resources: Resources) -> str:
    """How many processes: SLURM's own count where srun starts them."""
    gpus = resources.gpus_per_node
    return {
        "torchrun": f"--nproc-per-node {gpus} ",
        "accelerate": f"--num_processes {gpus * resources.nodes} ",
        "deepspeed": f"--num_gpus {gpus} ",
        "srun": "",
    }[config.cluster.launcher]


def _mounts(cluster: ClusterConfig, place: Place | None) -> list[str]:
    """What has to be seen inside: the code, the folder that paths count from, the run, and what the user names."""
    assert cluster.container is not None
    own = [] if place is None else [place.directory, place.checkout, place.run]
    paths: list[str] = []
    for path in own:
        if path is not None and not any(Path(path).is_relative_to(other) for other in paths):
            paths.append(path)
    return [f"{path}:{path}" for path in paths] + cluster.container.mounts


def step_options(cluster: ClusterConfig, place: Place | None) -> list[str]:
    """Options of every srun that runs inside the container."""
    container = cluster.container
    if container is None or container.runtime != "pyxis":
        return []
    options = [f"--container-image={container.image}"]
    mounts = _mounts(cluster, place)
    if mounts:
        options.append(f"--container-mounts={','.join(mounts)}")
    if place is not None:
        options.append(f"--container-workdir={place.directory}")
    # In a container they count over those of the image.
    return [*options, f"--container-env={','.join([*OWN_VARIABLES, *cluster.environment])}"]


def step_command(cluster: ClusterConfig, place: Place | None, *, gpus: bool) -> list[list[str]]:
    """What stands before the command of a step: words that belong together, a line each."""
    container = cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    binds = [["--bind", mount] for mount in _mounts(cluster, place)]
    directory = [] if place is None else [["--pwd", place.directory]]
    return [["apptainer", "exec", *(["--nv"] if gpus else [])], *binds, *directory, [container.image]]
