"""What the doctor makes of what it found: pure functions, with the figures of machines that are not here."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sft_dist.config.schema import Config
from sft_dist.doctor import machine
from sft_dist.doctor.disks import Disk, check_disk, check_shared, disks_of
from sft_dist.doctor.finding import Finding, Verdict, blamed, odd_ones
from sft_dist.doctor.gpus import DriverState, GpuState, check_gpus, check_torch, read_driver
from sft_dist.doctor.inputs import check_inputs
from sft_dist.doctor.names import check_clocks, check_names
from sft_dist.doctor.place import find_place
from sft_dist.doctor.report import render
from sft_dist.doctor.speeds import Pair, check_all_reduce, check_cores, check_gpu_products, check_pairs
from sft_dist.doctor.versions import check_versions, installed
from sft_dist.doctor.wanted import GPU_PROCESS_BYTES, Wanted, wanted_of
from sft_dist.doctor.worker import rounds
from sft_dist.errors import ConfigError
from tests.helpers.small_disk import Tmpfs, small_disk

GIB = 2**30
FOUR = ("n1", "n2", "n3", "n4")


def keys(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.node, f.check, f.level) for f in findings]


# --- who is to blame


@pytest.mark.parametrize(
    ("findings", "nodes", "at_fault"),
    [
        ([("memory", "n2", "failed")], ("n1", "n2"), ("n2",)),
        ([("memory", "n1", "failed"), ("memory", "n2", "failed")], ("n1", "n2"), ()),
        ([("memory", "n1", "failed"), ("memory", "n2", "failed"), ("clock", "n2", "failed")], ("n1", "n2"), ("n2",)),
        ([("memory", "n2", "warning"), ("processes", "", "failed")], ("n1", "n2"), ()),
        ([("memory", "n1", "failed")], ("n1",), ("n1",)),
    ],
)
def test_a_node_is_blamed_for_what_others_pass(
    findings: list[tuple[str, str, Any]], nodes: tuple[str, ...], at_fault: tuple[str, ...]
) -> None:
    assert blamed([Finding(c, n, level, "") for c, n, level in findings], nodes) == at_fault


def test_alone_a_node_is_not_blamed_for_a_disk_that_others_may_share() -> None:
    assert blamed([Finding("output_dir", "n1", "failed", "", is_shared=True)], ("n1",)) == ()


def test_most_nodes_are_right_and_the_first_in_a_tie() -> None:
    assert odd_ones({"n1": 1, "n2": 2, "n3": 2}, FOUR) == (2, ["n1"])
    assert odd_ones({"n2": 2, "n1": 1}, FOUR) == (1, ["n2"])


def test_the_document_says_the_verdict_the_table_says_the_fix() -> None:
    findings = (
        Finding("memory", "n1", "ok", "enough", value=3.0),
        Finding("memory", "n2", "ok", "enough", value=3.0),
        Finding("cores", "n2", "warning", "few", "ask for more", 1),
        Finding("clock", "n2", "failed", "ahead", "chronyd", 40.0),
    )
    verdict = Verdict(("n1", "n2"), findings, "2026-01-01T00:00:00+00:00", 1.234)
    document = verdict.to_json()
    assert [document[key] for key in ("schema", "verdict", "exit_code", "failed_nodes")] == [1, "failed", 7, ["n2"]]
    assert [f["level"] for f in document["findings"]] == ["failed", "warning", "ok", "ok"]
    assert set(document["findings"][0]) == {"check", "node", "level", "what", "fix", "value"}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    render(verdict, console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [
        ["failed", "n2", "clock", "ahead"], ["fix:", "chronyd"], ["warning", "n2", "cores", "few"],
        ["fix:", "ask", "for", "more"], ["ok", "memory", "enough"],
        ["verdict:", "failed", "2", "nodes,", "1.2", "s,", "1", "failed,", "1", "warning;", "at", "fault:", "n2"],
    ]  # fmt: skip


# --- speeds


def windows(*rates_and_shares: tuple[float, float]) -> list[dict[str, float]]:
    return [{"flops_per_s": rate * 1e9, "share": share} for rate, share in rates_and_shares]


def test_a_straggler_is_slow_all_the_time() -> None:
    fast, moment = windows((20, 1.0), (19, 1.0)), windows((3, 0.2), (19, 1.0))
    assert keys(check_cores({"n1": fast, "n2": moment})) == [("", "straggler", "ok")]
    starved, throttled = windows((5, 0.25), (4, 0.2)), windows((9, 1.0), (9, 1.0))
    found = check_cores({"n1": fast, "n2": starved, "n3": throttled, "n4": fast, "n5": fast})
    assert keys(found) == [("n2", "straggler", "failed"), ("n3", "straggler", "warning")]
    assert "it gets 25% of a core" in found[0].what
    assert found[0].value == 4.0
    assert "has the core to itself" in found[1].what
    # Where all are busy with other things, only much counts.
    busy = windows((4, 0.2))
    assert keys(check_cores({"n1": windows((7, 0.4)), "n2": busy, "n3": busy})) == [("", "straggler", "ok")]
    # Of two, the slower one.
    assert keys(check_cores({"n1": starved, "n2": fast})) == [("n1", "straggler", "failed")]


def pairs(**rates: float) -> list[Pair]:
    return [Pair(*name.split("_"), latency_s=50e-6, bytes_per_s=rate) for name, rate in rates.items()]


def test_a_slow_link_is_named_and_a_node_whose_links_are_all_slow() -> None:
    one = pairs(n1_n2=9e8, n1_n3=1e8, n2_n3=9e8, n1_n4=9e8, n2_n4=9e8, n3_n4=9e8)
    found = check_pairs(one, network=None)
    assert keys(found) == [("", "slow link", "warning")]
    assert found[0].what.startswith("n1 - n3: 100.0 MB/s, 9 times slower")
    node = pairs(n1_n2=9e8, n1_n3=5e7, n2_n3=5e7, n1_n4=9e8, n2_n4=9e8, n3_n4=5e7)
    assert keys(check_pairs(node, network=None)) == [("n3", "slow link", "failed")]
    assert keys(check_pairs(pairs(n1_n2=9e8), network="infiniband-ndr")) == [("", "network", "ok")]


def test_a_network_that_is_not_the_stated_one() -> None:
    slow = pairs(n1_n2=1.1e8, n1_n3=1.1e8, n2_n3=1.1e8)
    assert keys(check_pairs(slow, network=None)) == [("", "network", "ok")]
    found = check_pairs(slow, network="ethernet-100g")
    assert keys(found) == [("", "network", "warning")]
    assert "ethernet-100g" in found[0].what
    assert "GLOO_SOCKET_IFNAME" in found[0].fix


def test_gpus_against_each_other_and_the_table() -> None:
    name = {"n1": "NVIDIA H100 80GB HBM3", "n2": "NVIDIA H100 80GB HBM3"}
    same = {(node, device): 700e12 for node in name for device in range(8)}
    assert keys(check_gpu_products(same, name)) == [("", "GPU speed", "ok")]
    found = check_gpu_products(same | {("n2", 5): 300e12}, name)
    assert keys(found) == [("n2", "slow GPU", "failed")]
    assert "GPU 5 is 2.3 times slower" in found[0].what
    assert keys(check_gpu_products(dict.fromkeys(same, 200e12), name)) == [("", "GPU speed", "warning")]


@pytest.mark.parametrize(
    ("rate", "nodes", "level"), [(350e9, 1, "ok"), (40e9, 1, "warning"), (40e9, 2, "ok"), (3e9, 2, "failed")]
)
def test_all_reduce_against_links_and_network(rate: float, nodes: int, level: str) -> None:
    """NVLink within a node, one card of 400 Gbit/s between nodes."""
    measured = {"n1": {"bytes_per_s": rate, "backend": "nccl"}}
    gpu, network = "NVIDIA H100 80GB HBM3", "infiniband-ndr"
    found = check_all_reduce(measured, gpu=gpu, gpus_per_node=8, nodes=nodes, network=network)
    assert keys(found) == [("", "all-reduce", level)]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_in_a_tournament_everybody_meets_everybody_once(size: int) -> None:
    met = [tuple(sorted(pair)) for each in rounds(size) for pair in each.items()]
    assert sorted(met) == sorted(2 * list(itertools.combinations(range(size), 2)))
    assert all(len(each) >= size - 1 for each in rounds(size))


def test_among_many_not_everybody_meets() -> None:
    assert len(rounds(64)) == 7
    assert all(sorted(each) == list(range(64)) for each in rounds(64))


# --- GPUs

H100 = GpuState(0, "NVIDIA H100 80GB HBM3", 80 * GIB, GIB // 2, (), 0, 0, 40)
DRIVER = DriverState("580.1", (13, 0), tuple(replace(H100, index=index) for index in range(8)))


def gpus(driver: DriverState | None, wanted: int | None = 8, model: str | None = "h100") -> list[Finding]:
    return check_gpus("n1", driver, wanted=wanted, model=model)


def test_gpus_that_are_there() -> None:
    assert keys(gpus(DRIVER)) == [("n1", "GPUs", "ok")]
    assert keys(gpus(None, wanted=None)) == [("n1", "GPUs", "ok")]
    found = gpus(replace(DRIVER, gpus=DRIVER.gpus[:7]))
    assert keys(found) == [("n1", "GPUs", "failed")]
    assert found[0].what == "7 of 8 GPUs"
    assert keys(gpus(DRIVER, model="a100-80gb")) == [("n1", "GPU model", "warning")]
    assert keys(gpus(DRIVER, model="b200")) == [("n1", "GPU model", "failed")]


@pytest.mark.parametrize(
    ("change", "expected", "word"),
    [
        ({"used_bytes": 30 * GIB, "processes": (4711,)}, ("n1", "GPU memory", "failed"), "processes 4711 hold 30.0"),
        ({"processes": (4711,)}, ("n1", "GPU memory", "warning"), "4711"),
        ({"uncorrected_errors": 3}, ("n1", "GPU errors", "failed"), "3 errors"),
        (
            {"slowed_by": 0x40 | 0x8, "temperature_c": 91},
            ("n1", "GPU clock", "warning"),
            "heat and the hardware, at 91",
        ),
        ({"slowed_by": 0x1 | 0x4}, ("n1", "GPUs", "ok"), "8 x"),  # idle, and its usual power cap
    ],
)
def test_gpus_that_are_not_well(change: dict[str, Any], expected: tuple[str, str, str], word: str) -> None:
    found = gpus(replace(DRIVER, gpus=(*DRIVER.gpus[:7], replace(H100, index=7, **change))))
    assert keys(found) == [expected]
    assert word in found[0].what


@pytest.mark.parametrize(
    ("torch", "driver", "level", "word"),
    [
        ({}, DRIVER, "ok", "CUDA 13.0, NCCL 2.28.9, driver 580.1"),
        ({"cuda": "12.8"}, DRIVER, "ok", "CUDA 12.8"),
        ({}, replace(DRIVER, cuda=(12, 4)), "failed", "knows up to 12.4"),
        ({"cuda": None, "devices": 0}, DRIVER, "failed", "is for CPUs, and there are GPUs"),
        ({"devices": 0, "error": "unknown error"}, DRIVER, "failed", "sees 0 of 8 GPUs: unknown error"),
        ({"cuda": None, "devices": 0}, None, "ok", "for CPUs; no GPU here"),
    ],
)
def test_torch_and_the_driver(torch: dict[str, Any], driver: DriverState | None, level: str, word: str) -> None:
    facts = {"version": "2.13.0", "cuda": "13.0", "nccl": "2.28.9", "devices": 8, "error": ""} | torch
    found = check_torch("n1", facts, driver)
    assert keys(found) == [("n1", "torch and driver", level)]
    assert word in found[0].what


def test_the_driver_as_json_and_back() -> None:
    from sft_dist.doctor.judge import _driver

    assert _driver(DRIVER.to_json()) == DRIVER


def test_without_a_driver_there_is_none() -> None:
    if not Path("/proc/driver/nvidia/version").exists():
        assert read_driver() is None


# --- what has to be alike


def test_versions() -> None:
    here = installed()
    assert keys(check_versions({"n1": here, "n2": here}, FOUR)) == [("", "versions", "ok")]
    other = here | {"torch": "2.11.0", "numpy": "1.0"}
    found = check_versions({"n1": here, "n2": other, "n3": here}, FOUR)
    assert keys(found) == [("n2", "versions", "failed"), ("n2", "versions", "warning")]
    assert found[0].what == f"torch 2.11.0, the others have {here['torch']}"


def test_names() -> None:
    good = {"n1": ["10.0.0.1"], "n2": ["10.0.0.2"]}
    assert keys(check_names({"n1": good, "n2": good}, ("n1", "n2"))) == [("", "host names", "ok")]
    # Nobody knows n2: that is n2's matter; one does not know n1: that is his.
    nobody = good | {"n2": "Name or service not known"}
    assert keys(check_names({"n1": nobody, "n2": nobody}, ("n1", "n2"))) == [("n2", "host names", "failed")]
    lost = good | {"n1": "Name or service not known"}
    assert keys(check_names({"n1": good, "n2": lost}, ("n1", "n2"))) == [("n2", "host names", "failed")]
    # A node's own name may mean its loopback, another's not.
    assert keys(check_names({"n1": good | {"n1": ["127.0.1.1"]}, "n2": good}, ("n1", "n2")))[0][2] == "ok"
    found = check_names({"n1": good, "n2": good | {"n1": ["127.0.0.1"]}}, ("n1", "n2"))
    assert keys(found) == [("n2", "host names", "failed")]


def test_clocks() -> None:
    """Offsets are of the first node's clock over each."""
    assert keys(check_clocks({"n1": 0.0, "n2": 0.4, "n3": -0.3}, FOUR)) == [("", "clock", "ok")]
    found = check_clocks({"n1": 0.0, "n2": 3.0, "n3": 0.1}, FOUR)
    assert keys(found) == [("n2", "clock", "warning")]
    assert "behind" in found[0].what
    first_is_wrong = check_clocks({"n1": 0.0, "n2": -50.0, "n3": -50.1}, FOUR)
    assert keys(first_is_wrong) == [("n1", "clock", "failed")]
    assert "50.0 s behind" in first_is_wrong[0].what


def test_a_folder_is_shared_among_those_who_see_the_same_tokens() -> None:
    tokens = {"n1": "a", "n2": "b", "n3": "c"}
    same = {name: ["a", "b", "c"] for name in tokens}
    folder = Path("/runs")
    assert keys(check_shared(tokens, same, folder, FOUR)) == [("", "shared folder", "ok")]
    apart = {"n1": ["a"], "n2": ["b", "c"], "n3": ["b", "c"]}
    assert keys(check_shared(tokens, apart, folder, FOUR)) == [("n1", "shared folder", "failed")]
    read_only = tokens | {"n2": None}
    assert keys(check_shared(read_only, {key: ["a", "c"] for key in tokens}, folder, FOUR))[0][2] == "ok"


# --- what a run needs


def config(tmp_path: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "model": {"path": "some/model"},
            "data": {"train": [{"path": "rows.jsonl"}]},
            "train": {"global_batch_size": 1, "max_steps": 1},
            "output_dir": str(tmp_path / "runs" / "x"),
            **sections,
        }
    )


def test_what_a_configuration_wants(tmp_path: Path) -> None:
    wanted = wanted_of(config(tmp_path, hardware={"gpu": "h100", "gpus_per_node": 8, "host_memory_gib": 1000}))
    assert (wanted.gpus, wanted.processes, wanted.gpu, wanted.stated_memory_gib) == (8, 8, "h100", 1000)
    assert [disk.folder for disk in disks_of(wanted, {})][:2] == [tmp_path / "runs/x", tmp_path / "runs/data_cache"]
    on_cpus = wanted_of(config(tmp_path, hardware={"gpus_per_node": 2}, cluster={"request_gpus": "none"}))
    assert (on_cpus.gpus, on_cpus.processes) == (None, 2)
    assert wanted_of(config(tmp_path)).gpus is None


@pytest.mark.parametrize(("size", "filled", "said"), [("8m", False, "8.0 MiB free"), ("2m", True, "0.0 MiB free")])
def test_a_disk_with_little_room_is_said_to_have_little(tmp_path: Path, size: str, filled: bool, said: str) -> None:
    with small_disk(tmp_path / "disk", size=size) as disk:
        if not isinstance(disk, Tmpfs):
            pytest.skip("nothing may be mounted here")
        if filled:
            disk.fill(disk.folder / "growing")
        for wanted in (Disk("output_dir", disk.folder, 64 * 2**20, GIB), Disk("TMPDIR", disk.folder, 16 * 2**20, GIB)):
            (found,), _ = check_disk("n1", wanted)
            assert found.level == "failed"
            assert found.what == f"{said} in {disk.folder}, {wanted.needed_bytes / 2**20:.1f} MiB needed"
        assert {path.name for path in disk.folder.iterdir()} <= {"filler"}


def test_a_model_and_data_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)

    def levels(env: dict[str, str], **sections: Any) -> list[tuple[str, str, str]]:
        return keys(check_inputs("n1", config(tmp_path, **sections), env))

    assert levels({}) == [("n1", "model", "failed"), ("n1", "data", "failed")]
    assert levels({}, cluster={"partition": "gpu"}) == [("n1", "model", "warning"), ("n1", "data", "warning")]
    assert levels({"SLURM_JOB_ID": "7"}) == [("n1", "model", "warning"), ("n1", "data", "warning")]
    model, data = check_inputs("n1", config(tmp_path), {})
    assert "some/model is not in the local hub cache" in model.what
    assert model.fix == "sft-dist model fetch CONFIG"
    assert "rows.jsonl does not exist" in data.what
    assert blamed([model, data], ["n1"]) == (), "no node is left out for it"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert levels({}) == [("n1", "model", "ok"), ("n1", "data", "ok")]


def test_figures_of_a_plan_count_if_it_is_of_this_run(tmp_path: Path) -> None:
    here = {"gpu": "h100-80gb", "gpus_per_node": 8, "nodes": 2}
    plan = {
        "subject": {
            "model": "some/model, 8B parameters, 8B trained",
            "method": "full",
            "machines": "2 nodes of 8 x H100-SXM",
        },
        "memory": {"host_parts": {"processes": 3 * GIB, "saving": GIB}, "disk_parts": {"cache": 5, "checkpoints": 70}},
    }
    file = tmp_path / "runs" / "x" / "plan.json"
    file.parent.mkdir(parents=True)
    file.write_text(__import__("json").dumps(plan))
    wanted = wanted_of(config(tmp_path, hardware=here))
    assert (wanted.host_bytes, wanted.disk_parts) == (4 * GIB, {"cache": 5, "checkpoints": 70})
    assert disks_of(wanted, {})[0].needed_bytes == 70
    assert wanted_of(config(tmp_path, hardware=here, method={"type": "lora"})).host_bytes is None
    for others in ({}, here | {"nodes": 1}, here | {"gpus_per_node": 4}, here | {"gpu": "a100-80gb"}):
        assert wanted_of(config(tmp_path, hardware=others)).disk_parts is None, others


def test_memory_of_the_plan_and_of_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(wanted: Wanted, limit: tuple[int, int, str] | None, **processes: Any) -> list[Finding]:
        monkeypatch.setattr(machine, "memory_limit_bytes", lambda: limit)
        return machine.check_memory("n1", wanted, **({"num_processes": 1, "on_gpus": False} | processes))

    plenty = (10**15, 0, "nobody")
    assert keys(check(Wanted(), plenty)) == [("n1", "memory", "ok")]
    assert keys(check(Wanted(host_bytes=10**15), plenty)) == [("n1", "memory", "failed")]
    limited = check(Wanted(), (3 * GIB, GIB, "SLURM's --mem"), num_processes=1, on_gpus=True)
    assert keys(limited) == [("n1", "memory", "failed")]
    assert (
        f"2.0 GiB of 3.0 GiB free (limit of SLURM's --mem); {GPU_PROCESS_BYTES / GIB:.1f} GiB needed" in limited[0].what
    )
    assert keys(check(Wanted(stated_memory_gib=10**6), plenty)) == [("n1", "memory", "warning")]


def test_a_limit_of_slurm_counts() -> None:
    limit = machine.memory_limit_bytes({"SLURM_MEM_PER_NODE": "100"})
    assert limit is not None
    assert limit[0] == 100 * 2**20
    assert "SLURM" in limit[2]


# --- where it runs

STEP = {
    "SLURM_JOB_ID": "10", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NNODES": "2",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1", "SLURM_LOCALID": "0",
    "SLURMD_NODENAME": "n2", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}  # fmt: skip


def test_the_place_in_a_step() -> None:
    from sft_dist.runtime.slurm_step import step_from_environment

    place = find_place(STEP)
    assert (place.name, place.index, place.size, place.first_hosts) == ("n2", 1, 2, ("n1", "10.0.0.1"))
    following = step_from_environment(STEP | {"SLURM_STEP_ID": "1"})
    assert following is not None
    assert place.training_port == following.port
    assert place.training_port not in place.meeting_ports
    assert find_place(STEP, port=4000).training_port == 4000
    assert find_place(STEP | {"MASTER_PORT": "5000"}).training_port == 5000
    # Another attempt of the same job is another meeting.
    assert find_place(STEP | {"SLURM_RESTART_COUNT": "1"}).meeting_name != place.meeting_name


def test_the_place_under_torchrun_and_alone() -> None:
    launched = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        find_place(launched)
    place = find_place(launched | {"MASTER_ADDR": "first", "MASTER_PORT": "29500"})
    assert (place.index, place.size, place.speaks, place.training_port) == (1, 2, False, 29500)
    assert (find_place({}).size, find_place({}).training_port) == (1, None)
