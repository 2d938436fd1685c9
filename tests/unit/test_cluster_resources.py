"""What a job asks for: from the plan, or as the configuration says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft_dist.cluster.resources import Resources, planned_run, resources_of
from sft_dist.config.load import load_config
from sft_dist.config.schema import Config
from sft_dist.errors import ConfigError, UnknownHardware
from sft_dist.plan.dry_run import STAND_IN, DryRun
from sft_dist.plan.result import Range

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/recipes/70b_lora_8xh100.yaml"
GIB = 2**30


def config(*overrides: str) -> Config:
    return load_config(RECIPE, overrides)


@pytest.fixture(scope="module")
def planned() -> DryRun:
    found = planned_run(config(), assumed=STAND_IN)
    assert found is not None
    return found


def changed(
    planned: DryRun, *, total_s: float = 3600, load_s: float = 180, save_bytes: None = None, **data: Any
) -> DryRun:
    """The plan with figures that can be counted with; a step of 10 to 20 s."""
    time = replace(
        planned.plan.time,
        total=Range(total_s, 0.8 * total_s, 1.5 * total_s),
        step=Range(15, 10, 20),
        phases={"load": load_s, "prepare": 0.0, "train": total_s - load_s, "eval": 600.0, "save": 5.0},
    )
    found = replace(planned.plan.data, basis="prepared", **data)
    return replace(planned, plan=replace(planned.plan, time=time, data=found))


def with_host(planned: DryRun, parts_gib: dict[str, float]) -> DryRun:
    memory = replace(planned.plan.memory, host_parts={name: int(size * GIB) for name, size in parts_gib.items()})
    return replace(planned, plan=replace(planned.plan, memory=memory))


def test_of_a_plan(planned: DryRun) -> None:
    found = resources_of(config(), planned)
    needed = sum(planned.plan.memory.host_parts.values()) / GIB
    assert (found.nodes, found.gpus_per_node, found.tasks_per_node) == (1, 8, 1)
    assert found.cpus_per_node == found.cpus_per_task == 8 * 4
    assert 1.19 * needed < found.memory_gib < 1.21 * needed + 1
    spent = planned.plan.time.total.value * 1.5 + found.signal_before_s
    assert spent < found.time_limit_s < spent + 60 + 20 + 300
    assert found.starts == 1
    assert found.reasons["nodes"] == "hardware.nodes is not set"
    assert found.reasons["gpus_per_node"] == "hardware.gpus_per_node"
    assert all("\n" not in reason for reason in found.reasons.values())


def test_memory_grows_by_a_share_and_at_most_by_so_much_a_process(planned: DryRun) -> None:
    small = resources_of(config(), with_host(planned, {"processes": 36, "saving": 64}))
    assert (small.memory_gib, small.reasons["memory_gib"]) == (
        120, "planned 100.0 GiB and 20.0 more; most is saving, 64.0",
    )  # fmt: skip
    large = resources_of(config(), with_host(planned, {"processes": 36, "offloaded states": 1964}))
    assert large.memory_gib == 2000 + 8 * 8


def test_an_optimizer_on_the_host_has_cores_of_its_own(planned: DryRun) -> None:
    found = resources_of(config(), with_host(planned, {"offloaded states": 8}))
    assert found.cpus_per_task == 8 * 8
    assert found.reasons["cpus_per_task"].endswith("; 4 for states on the host")


def test_plain_srun_starts_each_process(planned: DryRun) -> None:
    found = resources_of(config("cluster.launcher=srun"), planned)
    assert (found.tasks_per_node, found.cpus_per_task, found.cpus_per_node) == (8, 4, 32)


def test_the_signal_leaves_time_to_finish_and_save(planned: DryRun) -> None:
    quick = resources_of(config(), changed(planned, evaluations=0))
    # 3 steps of at most 20 s, a save of some gigabytes, 60 s: two minutes and some.
    assert quick.signal_before_s == 180
    slow = resources_of(config(), changed(planned, evaluations=2))
    # An evaluation of 300 s, and twice that where disks or estimates are off.
    assert slow.signal_before_s == 180 + 600
    assert "an evaluation 10 min" in slow.reasons["signal_before_s"]
    unknown = resources_of(config(), planned)
    assert "an evaluation (data.eval is not here) 5 min" in unknown.reasons["signal_before_s"]


def test_a_signal_that_slurm_cannot_send_is_refused(planned: DryRun) -> None:
    never = changed(planned, evaluations=1)
    never = replace(
        never, plan=replace(never.plan, time=replace(never.plan.time, phases={"load": 1.0, "eval": 40_000.0}))
    )
    with pytest.raises(ConfigError, match="SLURM signals at most 65535 s before") as caught:
        resources_of(config(), never)
    assert "cluster.signal_before_s" in caught.value.fix


def test_the_cluster_s_own_words_count(planned: DryRun) -> None:
    found = resources_of(
        config("cluster={cpus_per_gpu: 12, memory_gib: 900.5, time_limit: 2-00:00:00, signal_before_s: 600}"), planned
    )
    assert (found.cpus_per_task, found.memory_gib, found.time_limit_s, found.signal_before_s) == (96, 901, 172_800, 600)
    reasons = [found.reasons[key] for key in ("cpus_per_task", "memory_gib", "signal_before_s")]
    assert reasons == ["8 x 12: cluster.cpus_per_gpu", "cluster.memory_gib", "cluster.signal_before_s"]
    assert found.reasons["time_limit_s"].startswith("cluster.time_limit; planned are")


def test_a_margin_of_the_time(planned: DryRun) -> None:
    plan = changed(planned, total_s=3600, evaluations=0)
    assert (
        resources_of(config("cluster.time_margin=1"), plan).time_limit_s == 3900
    )  # and 180 + 60 + 20 s, in whole 5 min
    assert resources_of(config("cluster.time_margin=2"), plan).time_limit_s == 9000  # in whole half hours


def test_a_short_limit_takes_several_starts(planned: DryRun) -> None:
    plan = changed(planned, total_s=36_180, load_s=180, evaluations=0)
    found = resources_of(config("cluster={time_limit: 1:00:00}"), plan)
    # Of 3,600 s: 180 to load, 20 for the doctor, 180 + 60 before the end.
    assert found.starts == -(-36_000 // (3600 - 440))
    assert found.reasons["time_limit_s"].endswith(": 12 starts, each from the checkpoint of the last")


def test_a_limit_without_time_to_train_is_refused(planned: DryRun) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.time_limit 00:05:00 leaves no time to train in") as caught:
        resources_of(config("cluster={time_limit: '5'}"), changed(planned, evaluations=0))
    assert caught.value.fix == "set cluster.time_limit to 01:10:00 or more"


def without_gpu(*overrides: str) -> Config:
    return config("hardware={nodes: 2, gpus_per_node: 2}", "cluster.request_gpus=none", *overrides)


def test_without_a_gpu_the_configuration_says_it_all() -> None:
    with pytest.raises(ConfigError) as caught:
        planned_run(without_gpu())
    assert "cluster.time_limit and cluster.memory_gib would come from the plan" in caught.value.what
    assert caught.value.fix == (
        "set cluster.time_limit and cluster.memory_gib, or hardware.gpu to the GPU of the nodes, e.g. h100"
    )
    with pytest.raises(ConfigError, match=r"and cluster\.memory_gib would come"):
        planned_run(without_gpu("cluster.time_limit=1:00:00"))
    stated = without_gpu("cluster.time_limit=1:00:00", "cluster.memory_gib=8")
    assert planned_run(stated) is None
    found = resources_of(stated, None)
    assert found == Resources(2, 2, 1, 8, 8, 3600, 300, None, found.reasons, "processes")
    with pytest.raises(ConfigError, match="leaves no time to train in"):
        resources_of(without_gpu("cluster.time_limit='5'", "cluster.memory_gib=8"), None)


def test_a_gpu_that_nobody_knows_is_named() -> None:
    with pytest.raises(UnknownHardware, match="h1000"):
        planned_run(config("hardware.gpu=h1000", "cluster={time_limit: '60', memory_gib: 8}"))
