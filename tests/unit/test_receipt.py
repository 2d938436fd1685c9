"""What a run is planned to take, what it measured, and that neither can stop it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sft_dist.config.hardware_schema import HardwareConfig
from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder
from sft_dist.errors import UnknownHardware
from sft_dist.hardware.gpus import find_gpu
from sft_dist.plan.calibration import calibration_key, lookup
from sft_dist.plan.data import counted_plan
from sft_dist.plan.dry_run import plan_run
from sft_dist.plan.expected import Expected, expect
from sft_dist.plan.machines import Machines, machines_here
from sft_dist.plan.to_json import plan_text
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.train import outlook as outlook_module
from sft_dist.train.outlook import NO_GPU, Outlook, look_ahead
from sft_dist.train.receipt import Actual, calibrate, feed_calibration, ratios, write_receipt
from sft_dist.train.sessions import RECEIPT, Session
from sft_dist.train.surroundings import versions
from tests.helpers import cells

H100 = Machines(find_gpu("h100"), 1, 1)

ACTUAL = Actual(
    peak_allocated_bytes=900, first_step=1, steps=6, tokens=1000, evaluations=0, checkpoint_bytes=50, final_bytes=20,
    step_s=0.5, steady_steps=5, tokens_per_s=300.0, total_s=70.0, cost_usd=None,
)  # fmt: skip


def parts(base: Path, folder: Path, method: str = "lora") -> tuple[Config, Run]:
    cfg = cells.config(str(base), method, "ddp", precision={"compute": "bf16"})
    cfg = cfg.model_copy(update={"output_dir": str(folder)})
    return cfg, resolve(cfg, WorldShape())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No calibration of another test, and none for it."""
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The outlook


def test_a_cpu_has_sizes_and_counts_and_no_invented_seconds(tiny_base: Path, tmp_path: Path) -> None:
    cfg, run = parts(tiny_base, tmp_path)
    data = cells.synthetic_data()
    seen = look_ahead(cfg, run, cells.CPU, data, None)
    assert seen.missing == (NO_GPU,)
    assert (seen.machines, seen.price) == (None, None)
    assert seen.expected is not None
    epochs = 6 // run.batch.steps_per_epoch(data.num_sequences)
    assert (seen.expected.steps, seen.expected.evaluations, seen.expected.checkpoints) == (6, 0, epochs)
    order = TrainingOrder(data, run.batch, run.seed)
    assert seen.expected.tokens == sum(order.step(number).num_tokens for number in range(6))
    assert seen.expected.peak_allocated_bytes > run.model.num_parameters * 2
    assert seen.expected.step_s is seen.expected.total_s is seen.expected.flops_per_token is None
    assert not (tmp_path / "plan.json").exists(), "a plan has seconds"


def test_a_cpu_in_place_of_the_gpu_that_is_named_is_told(tiny_base: Path, tmp_path: Path) -> None:
    cfg, run = parts(tiny_base, tmp_path)
    named = cfg.model_copy(update={"hardware": HardwareConfig(gpu="h100")})
    seen = look_ahead(named, run, cells.CPU, cells.synthetic_data(), None)
    assert seen.missing[:2] == (NO_GPU, "hardware.gpu is h100, but torch sees no GPU here: this trains on the CPU")


def test_a_known_gpu_has_the_same_and_the_rest(tiny_base: Path, tmp_path: Path, own_cache: Path) -> None:
    cfg, run = parts(tiny_base, tmp_path)
    data = counted_plan(run, cells.synthetic_data(), None, source="test")
    (sizes, no_plan), (whole, plan) = expect(cfg, run, None, data), expect(cfg, run, H100, data)
    assert no_plan is None
    assert plan is not None
    none = dict.fromkeys(
        ("step_s", "uncalibrated_step_s", "tokens_per_s", "total_s", "flops_per_token", "peak_flops_per_s")
    )
    assert replace(whole, **none) == sizes  # type: ignore[arg-type]
    assert whole.peak_allocated_bytes == plan.memory.allocated.value
    assert (whole.step_s, whole.total_s) == (plan.time.step.value, plan.time.total.value)
    assert whole.uncalibrated_step_s == whole.step_s
    assert whole.flops_per_token is not None
    assert whole.tokens_per_s is not None
    assert whole.flops_per_token * whole.tokens_per_s / 989e12 == pytest.approx(plan.time.mfu, rel=0.01)


def test_the_plan_in_the_folder_is_that_of_the_run(
    tiny_base: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made for other machines is replaced; one of the same stays, whatever it knew of the data."""
    cfg, run = parts(tiny_base, tmp_path)
    data = counted_plan(run, cells.synthetic_data(), None, source="test")
    found = expect(cfg, run, H100, data)
    _, plan = found
    assert plan is not None
    monkeypatch.setattr(outlook_module, "expect", lambda *_: found)
    file = tmp_path / "plan.json"

    def is_replaced(text: str) -> bool:
        file.write_text(text)
        assert look_ahead(cfg, run, cells.CPU, cells.synthetic_data(), None).missing == (NO_GPU,)
        return file.read_text() == plan_text(plan) + "\n"

    assert look_ahead(cfg, run, cells.CPU, cells.synthetic_data(), None).missing == (NO_GPU,)
    assert file.read_text() == plan_text(plan) + "\n"
    assert is_replaced(json.dumps({"subject": plan.subject | {"machines": "8 x B200"}}))
    assert is_replaced("{")
    assert is_replaced("[]")
    assert not is_replaced(json.dumps({"subject": plan.subject, "data": "as it was told"}))


def test_ranks_that_share_sequences_are_planned_too(tiny_base: Path, tmp_path: Path) -> None:
    cfg = cells.config(str(tiny_base), "lora", "fsdp2", sharding={"sequence_parallel": 2})
    seen = look_ahead(cfg, resolve(cfg, WorldShape(1, 2)), cells.CPU, cells.synthetic_data(), None)
    assert seen.missing == (NO_GPU,)
    assert seen.expected is not None


def test_a_plan_that_fails_stops_nothing(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, run = parts(tiny_base, tmp_path)
    # A file of prices that is not there is needed for the rate of the yen.
    hardware = HardwareConfig(price_per_hour_jpy=300.0, prices=str(tmp_path / "nowhere.yaml"))

    def breaks(*_: object) -> None:
        raise RuntimeError("a library\nhas changed")

    monkeypatch.setattr(outlook_module, "expect", breaks)
    seen = look_ahead(cfg.model_copy(update={"hardware": hardware}), run, cells.CPU, cells.synthetic_data(), None)
    assert (seen.expected, seen.price) == (None, None)
    _, plan, bill = seen.missing
    assert plan == "no plan to compare with: RuntimeError: a library has changed"
    assert bill.startswith("no bill: ConfigError: ")
    assert "nowhere.yaml" in bill


def test_the_gpu_that_is_here_counts_and_not_the_one_that_was_planned_for() -> None:
    planned = HardwareConfig(gpu="b200", nodes=4, gpus_per_node=8)
    here = machines_here(planned, WorldShape(2, 4), "NVIDIA H100 80GB HBM3")
    assert (here.gpu.name, here.nodes, here.gpus_per_node) == ("H100-SXM", 2, 4)
    assert here.network is not None
    # What the driver says may be unknown to the table: then the user knows what it is.
    assert machines_here(planned, WorldShape(), "NVIDIA Mystery 9000").gpu.name.startswith("B200")
    with pytest.raises(UnknownHardware, match="Mystery"):
        machines_here(HardwareConfig(), WorldShape(), "NVIDIA Mystery 9000")


# Planned and actual


def test_ratios_are_actual_over_planned_where_both_are_known() -> None:
    expected = Expected(1000, 6, 1000, 0, 1, 40, 20, step_s=1.0, total_s=140.0)
    found = ratios(expected, ACTUAL)
    assert found == {
        "peak_allocated_bytes": 0.9, "checkpoint_bytes": 1.25, "final_bytes": 1.0, "step_s": 0.5, "tokens_per_s": None,
        "steps": 1.0, "tokens": 1.0, "evaluations": None, "total_s": 0.5,
    }  # fmt: skip
    # A run that went on from another one's checkpoint has trained the rest only.
    rest = ratios(expected, replace(ACTUAL, first_step=4))
    assert [rest[key] for key in ("steps", "tokens", "total_s", "step_s")] == [None, None, None, 0.5]


def test_a_run_feeds_the_next_plan(tiny_base: Path, tmp_path: Path, own_cache: Path) -> None:
    cfg, run = parts(tiny_base, tmp_path)
    data = counted_plan(run, cells.synthetic_data(), None, source="test")
    expected, _ = expect(cfg, run, H100, data)
    assert expected.step_s is not None
    slow = replace(ACTUAL, step_s=3 * expected.step_s, peak_allocated_bytes=expected.peak_allocated_bytes)
    assert feed_calibration(run, Outlook(H100, expected, None), replace(slow, steady_steps=4)) is None
    assert lookup("H100-SXM", calibration_key(run)) is None, "four steps are noise"
    assert feed_calibration(run, Outlook(H100, expected, None), slow) is None
    kept = lookup("H100-SXM", calibration_key(run))
    assert kept is not None
    assert (kept.time_ratio, kept.memory_ratio, kept.steps) == (pytest.approx(3.0), 1.0, 5)
    assert kept.versions == versions()
    # The next plan starts from it, and what is measured against is the plan without it.
    again, plan = expect(cfg, run, H100, data)
    assert plan is not None
    assert plan.time.basis == "calibrated here"
    assert again.uncalibrated_step_s == expected.step_s
    assert again.step_s is not None
    assert again.step_s > expected.step_s


def test_what_cannot_be_kept_is_told(tiny_base: Path, tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_text("no folder")
    _, run = parts(tiny_base, tmp_path)
    expected = Expected(1000, 6, 1000, 0, 1, 40, 20, step_s=1.0, uncalibrated_step_s=1.0)
    told = feed_calibration(run, Outlook(H100, expected, None), ACTUAL)
    assert told is not None
    assert told.startswith(f"{own_cache}/calibration cannot be written")


def test_nothing_is_fed_by_a_device_that_is_not_known(tiny_base: Path, tmp_path: Path, own_cache: Path) -> None:
    _, run = parts(tiny_base, tmp_path)
    expected = Expected(1000, 6, 1000, 0, 1, 40, 20)
    assert feed_calibration(run, Outlook(None, expected, None), ACTUAL) is None
    assert feed_calibration(run, Outlook(H100, expected, None), replace(ACTUAL, step_s=None)) is None
    assert not own_cache.exists()
    with pytest.raises(ValueError, match="not planned"):
        calibrate(run, "H100-SXM", expected, step_s=1.0, steps=5, peak_bytes=None)


def test_a_receipt_is_replaced_whole(tmp_path: Path) -> None:
    begun = Session("a", 1)
    write_receipt(tmp_path, (begun,), made_with={"versions": {"torch": "1"}})
    write_receipt(tmp_path, (replace(begun, ended=True), begun), made_with={"versions": {"torch": "2"}})
    written = json.loads((tmp_path / RECEIPT).read_text())
    assert (written["finished"], written["versions"]) == (False, {"torch": "2"})
    assert [session["ended"] for session in written["sessions"]] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == [RECEIPT], "and leaves nothing beside it"
    assert versions()["torch"] == torch.__version__


def test_a_calibrated_plan_names_its_source(tiny_base: Path, tmp_path: Path, own_cache: Path) -> None:
    """``plan_run`` and ``expect`` agree on what a run like it measured."""
    cfg, run = parts(tiny_base, tmp_path)
    data = counted_plan(run, cells.synthetic_data(), None, source="test")
    expected, _ = expect(cfg, run, H100, data)
    assert expected.uncalibrated_step_s is not None
    calibrate(run, "H100-SXM", expected, step_s=2 * expected.uncalibrated_step_s, steps=9, peak_bytes=None)
    assert plan_run(cfg, run, H100, data).time.source.startswith("9 steps measured on H100-SXM on ")
