"""``hardware``: the machines that a run is planned for, and what they cost. Training itself takes what is there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft_dist.config.section import Section


class OwnedHardware(Section):
    """Machines of one's own: what a run costs is its electricity."""

    price_per_kwh: float | None = Field(None, gt=0, description="USD a kWh. This or price_per_kwh_jpy.")
    price_per_kwh_jpy: float | None = Field(None, gt=0, description="JPY a kWh. This or price_per_kwh.")
    pue: float = Field(
        1.56,
        ge=1,
        description="Power of the whole building over that of its machines (power usage effectiveness); 1.56 is the "
        "mean of the Uptime Institute's survey of 2024.",
    )


class HardwareConfig(Section):
    """For plan and bill only: what is trained, and on how many processes, the launch decides."""

    gpu: str | None = Field(
        None,
        description="Model of the GPU, e.g. a100-80gb, h100 or rtx4090; null: that of this machine. Names: the table "
        "of GPUs, or as the driver says it.",
    )
    gpus_per_node: int | None = Field(None, ge=1, description="GPUs of a node; null: the processes of a node, or 1.")
    nodes: int | None = Field(None, ge=1, description="Nodes; null: those of the launch, or 1.")
    network: str | None = Field(
        None,
        description="Between nodes, e.g. infiniband-ndr-x8 or ethernet-100g, or a rented machine that has it, e.g. "
        "p5.48xlarge.",
    )
    host_memory_gib: float | None = Field(None, gt=0, description="Memory of a node, GiB; null: not known.")
    price_per_hour: float | None = Field(
        None, gt=0, description="What you pay, USD per GPU-hour; null: the table of prices."
    )
    price_per_hour_jpy: float | None = Field(None, gt=0, description="What you pay, JPY per GPU-hour.")
    owned: OwnedHardware | None = Field(None, description="Machines of your own, paid by the kWh.")
    provider: str | None = Field(
        None,
        description="Count with the prices of this provider only, e.g. AWS; null: the cheapest that anybody may rent.",
    )
    price_kind: Literal["on_demand", "spot"] = Field(
        "on_demand", description="Which price of the table counts; spot machines may be taken away at any time."
    )
    prices: str | None = Field(
        None, description="YAML file with prices of your own, of the shape of the shipped hardware/prices.yaml."
    )
    fx: float | None = Field(None, gt=0, description="JPY per USD; null: the newest rate of the table of prices.")
