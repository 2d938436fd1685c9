"""``train --profile``: what is traced, what is told of it, and that the run goes on as without."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

from sft_dist.config.schema import Config
from sft_dist.metrics.recorded import recorded_steps
from sft_dist.runtime.spans import PARTS, PREFIX, span, traced
from sft_dist.train.asked import Asked
from sft_dist.train.profile_summary import Operator, ProfileSummary, kind_of, shown, summarise
from sft_dist.train.profiling import WARM_UP_STEPS, Profiling
from sft_dist.train.run import run_training
from tests.helpers.taught import PAIRS, conversation, write_rows


def settings(base: Path, folder: Path, *, steps: int) -> Config:
    folder.mkdir(parents=True)
    rows = write_rows(folder / "train.jsonl", [conversation(*pair) for pair in PAIRS])
    return Config.model_validate(
        {
            "model": {"path": str(base)},
            "data": {"train": [{"path": str(rows)}], "max_seq_len": 128, "packing": "none"},
            "precision": {"compute": "fp32"},
            "sharding": {"strategy": "ddp"},
            "train": {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": steps},
            "eval": {"before_training": False},
            "checkpoint": {"prove_final": False},
            "logging": {"wandb": {"mode": "disabled"}},
            "output_dir": str(folder / "run"),
        }
    )


def test_steps_are_traced_and_the_run_is_the_same(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(settings(tiny_base, tmp_path / "plain", steps=7))
    run_training(settings(tiny_base, tmp_path / "traced", steps=7), Asked(profiled_steps=2))
    printed = capsys.readouterr().out
    assert "mean of 2 steps" in printed
    assert "backward" in printed
    folder = tmp_path / "traced" / "run" / "profile"
    summary = json.loads((folder / "rank-0.json").read_text())
    assert summary["steps"] == 2
    assert summary["device"] == "cpu"
    assert set(summary["parts"]) == {*PARTS, "rest"}
    assert sum(summary["parts"].values()) == pytest.approx(summary["step_s"], rel=0.02)
    assert sum(summary["kinds"].values()) == pytest.approx(summary["step_s"], rel=0.02)
    assert summary["parts"]["backward"] > summary["parts"]["data"] > 0
    assert {"products", "attention", "optimizer", "loss"} <= set(summary["kinds"])
    assert all(summary["kinds"][kind] > 0 for kind in ("products", "attention", "optimizer"))
    calls = {operator["name"]: operator["calls"] for operator in summary["operators"]}
    assert calls["aten::_fused_adamw_"] == 1
    with gzip.open(folder / "rank-0.trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    # Two steps of two micro-batches.
    assert names.count(f"{PREFIX}forward") == names.count(f"{PREFIX}backward") == 4
    assert names.count(f"{PREFIX}update") == 2
    plain, with_trace = (recorded_steps(tmp_path / name / "run") for name in ("plain", "traced"))
    assert plain == with_trace
    assert len(plain) == 7
    assert not (tmp_path / "plain" / "run" / "profile").exists()


def test_a_run_that_ends_early_tells_what_it_has(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(settings(tiny_base, tmp_path / "short", steps=5), Asked(profiled_steps=50))
    assert "mean of 1 step, traced" in capsys.readouterr().out


def test_ranks_have_files_of_their_own(tmp_path: Path) -> None:
    for rank in (0, 1):
        profiling = Profiling(tmp_path, rank=rank, device=torch.device("cpu"), steps=1)
        for _ in range(WARM_UP_STEPS + 1):
            with profiling.step():
                torch.ones(3).sum()
        profiling.finish()
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {
        "rank-0.json", "rank-0.trace.json.gz", "rank-1.json", "rank-1.trace.json.gz",
    }  # fmt: skip


def test_on_a_gpu_a_traced_step_ends_when_its_work_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("settled"))
    monkeypatch.setattr(Profiling, "_begin", lambda self: setattr(self, "_profile", object()))
    profiling = Profiling(tmp_path, rank=0, device=torch.device("cuda"), steps=2)
    for _ in range(WARM_UP_STEPS + 3):
        with profiling.step():
            events.append("step")
    assert events == ["step"] * WARM_UP_STEPS + ["step", "settled"] * 2 + ["step"]


def test_an_operators_share_is_of_the_step() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown(ProfileSummary(0, "cpu", 1, 0.5, {}, {}, [Operator("aten::mm", "products", 0.1, 2)], 0)))
    (line,) = (line for line in console.export_text().splitlines() if "aten::mm" in line)
    assert "20%" in line


def event(
    key: str, seconds: float = 0.0, *, on_device: float = 0.0, total: float = 0.0, count: int = 2, gpu: bool = False
) -> Any:
    return SimpleNamespace(
        key=key, self_cpu_time_total=1e6 * seconds, self_device_time_total=1e6 * on_device, cpu_time_total=1e6 * total,
        count=count, device_type=DeviceType.CUDA if gpu else DeviceType.CPU,
    )  # fmt: skip


def test_on_a_gpu_the_kinds_are_of_its_time_and_the_parts_of_the_hosts() -> None:
    events = [
        event(f"{PREFIX}forward", total=0.2), event("aten::mm", 0.01, on_device=0.6), event("aten::mul", 0.02, on_device=0.1),
        event("ampere_gemm", on_device=0.6, gpu=True), event("cudaStreamSynchronize", 0.3, count=6),
    ]  # fmt: skip
    summary = summarise(events, [0.5, 0.5], rank=3, device="cuda")
    assert summary.parts["forward"] == pytest.approx(0.1)
    assert summary.kinds["products"] == pytest.approx(0.3)
    assert summary.kinds["rest"] == pytest.approx(0.5 - 0.3 - 0.05)
    assert summary.waits == 3
    assert [operator.name for operator in summary.operators] == ["aten::mm", "aten::mul"]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(shown(summary))
    text = console.export_text()
    assert "a step of rank 3: 0.500 s" in text
    assert "the host waits 3.0 times a step" in text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm_", "products"), ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("sft_dist::packed_attention", "attention"), ("torch_attn::_varlen_attn", "attention"),
        ("c10d::allreduce_", "ranks"), ("bitsandbytes::dequantize_4bit", "dequantisation"),
        ("aten::_fused_adamw_", "optimizer"), ("aten::copy_", "copies and casts"), ("aten::silu_backward", "elementwise and sums"),
        ("aten::_log_softmax", "loss"), ("aten::view", "rest"),
    ],
)  # fmt: skip
def test_operators_have_a_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_without_a_trace_a_span_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.profiler

    def fail(_name: str) -> None:
        raise AssertionError("recorded")

    monkeypatch.setattr(torch.profiler, "record_function", fail)
    with span("forward"):
        pass
    with traced(), pytest.raises(AssertionError, match="recorded"), span("forward"):
        pass
