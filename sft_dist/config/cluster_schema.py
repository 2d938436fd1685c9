"""``cluster``: what a job asks SLURM for, and how it goes on after it was interrupted. For ``sft-dist submit`` alone.

Nodes and GPUs are those of ``hardware``; what the plan knows is taken from it where nothing is said here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft_dist.config.section import Section

# As sbatch reads them: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.
TIME_LIMIT = r"^(\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2})$"


class ContainerConfig(Section):
    """The container that doctor and training run in; the job itself talks to SLURM from outside."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        description="pyxis: srun's own --container-image; apptainer: `apptainer exec`."
    )
    image: str = Field(min_length=1, description="An image of the registry or a file, as the runtime names it.")
    mounts: list[str] = Field(default=[], description="SOURCE:TARGET folders to be seen inside, beside the checkout.")


class PrepareJobConfig(Section):
    """The job before the training: fetches the model and prepares the data, without a GPU."""

    partition: str | None = Field(None, description="null: cluster.partition.")
    cpus: int = Field(8, ge=1, description="Cores; data.num_workers processes tokenise.")
    memory_gib: float = Field(16.0, gt=0, description="Memory, GiB.")
    time_limit: str = Field("4:00:00", pattern=TIME_LIMIT, description="As sbatch reads it, e.g. 2:00:00.")


class ThenJobConfig(Section):
    """A job after the training, if that ended well."""

    command: str = Field(
        min_length=1, description="Of sft-dist, with {run} for the run directory, e.g. 'export {run} --merge'."
    )
    partition: str | None = Field(None, description="null: cluster.partition.")
    gpus: int = Field(0, ge=0, description="GPUs, on one node.")
    cpus: int = Field(8, ge=1, description="Cores.")
    memory_gib: float = Field(32.0, gt=0, description="Memory, GiB.")
    time_limit: str = Field("2:00:00", pattern=TIME_LIMIT, description="As sbatch reads it, e.g. 2:00:00.")


class ClusterConfig(Section):
    """For ``sft-dist submit`` only."""

    launcher: Literal["torchrun", "accelerate", "deepspeed", "srun"] = Field(
        "torchrun", description="What starts the processes of a node; srun starts each of them itself."
    )
    partition: str | None = Field(None, description="null: the cluster's default.")
    account: str | None = Field(None, description="Who is billed.")
    qos: str | None = Field(None, description="Quality of service.")
    constraint: str | None = Field(None, description="Features that the nodes have, e.g. 'h100&ib'.")
    reservation: str | None = Field(None, description="Name of a reservation.")
    exclude: list[str] = Field(default=[], description="Nodes that are not to be taken.")
    request_gpus: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="Option of sbatch that asks for hardware.gpus_per_node GPUs; none: for CPU nodes."
    )
    gpu_type: str | None = Field(None, description="SLURM's name of the GPU, e.g. h100; null: any.")
    cpus_per_gpu: int | None = Field(None, ge=1, description="Cores for each GPU; null: what the plan counts with.")
    memory_gib: float | None = Field(None, gt=0, description="Memory of a node, GiB; null: the plan's, with a margin.")
    time_limit: str | None = Field(
        None,
        pattern=TIME_LIMIT,
        description="Of one start of the job, e.g. 1-00:00:00; null: the plan's x time_margin.",
    )
    time_margin: float = Field(1.5, ge=1, description="Time limit over the planned time, where time_limit is null.")
    signal_before_s: int | None = Field(
        None,
        ge=60,
        le=65_535,
        description="Seconds before the time limit when to save and stop; null: from the plan.",
    )
    max_restarts: int = Field(
        3,
        ge=0,
        description="Times in a row that the job is started again without getting past a checkpoint; then it gives up.",
    )
    doctor: bool = Field(True, description="Check all nodes first, every time.")
    modules: list[str] = Field(default=[], description="To load, e.g. cuda/13.0.")
    setup: list[str] = Field(
        default=[], description="Shell lines before everything else, e.g. 'source .venv/bin/activate'."
    )
    environment: dict[str, str] = Field(default={}, description="Variables to export.")
    container: ContainerConfig | None = None
    options: list[str] = Field(default=[], description="Further options of sbatch for the training, e.g. --nice=100.")
    prepare: PrepareJobConfig = PrepareJobConfig()
    then: ThenJobConfig | None = None
