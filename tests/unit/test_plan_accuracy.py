"""The comparison with published rows: how rows are read, what is predicted of a few of them, and what is counted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import plan_accuracy
from benchmarks.peers.predict import predict, tape_of_work
from benchmarks.peers.reading import setup_of
from benchmarks.peers.score import family, score, summary
from benchmarks.peers.unmapped import Unmapped
from benchmarks.peers.words import counter
from sft_dist.plan.tape import Work

GIB = 2**30

# github.com/foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv and a100_80gb_liger.csv.
FMS: dict[str, Any] = {
    "id": "fms", "source": "github:foundation-model-stack/fms-acceleration@876e2ed:scripts/benchmarks/refs/a100_80gb.csv",
    "model": "mistralai/Mistral-7B-v0.1", "method": "lora", "n_gpus": 1, "gpu": "A100-80GB-SXM", "sharding": "none",
    "offload": "none", "seq_len": 4096, "micro_batch": 4, "grad_accum": 1,
    "grad_ckpt": "full per layer, HF (use_reentrant default True)", "optimizer": "adamw_torch (foreach)",
    "weights_dtype": "bfloat16", "compute_dtype": "bfloat16", "attention": "flash_attention_2",
    "kernels": "none(HF eager)", "packing": "packed to 4096", "versions": "torch 2.4.1, transformers 4.48.1, trl 0.13",
    "lora_r": 16, "lora_targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_dropout": 0.1,
    "peak_mem_gib": 24.8706, "peak_mem_kind": "torch max_memory_allocated, rank 0", "oom": False,
}  # fmt: skip
FULL = FMS | {"method": "full", "peak_mem_gib": 67.4602}
FSDP = FMS | {
    "n_gpus": 2, "micro_batch": 2, "sharding": "FSDP1 FULL_SHARD (accelerate, BACKWARD_PRE)", "peak_mem_gib": 14.1048
}  # fmt: skip
AMP_KERNELS = FMS | {
    "method": "qlora", "quant": "bnb-nf4-doublequant", "compute_dtype": "amp bf16", "micro_batch": 32,
    "kernels": "foak: triton FLCE (liger) + RMSNorm + RoPE + fused LoRA", "notes": "accelerated-peft-bnb-foak-liger",
    "versions": "torch 2.4.1, transformers 4.45.2, trl 0.11.4", "peak_mem_gib": 69.0319,
}  # fmt: skip
# github.com/Lightning-AI/litgpt, tutorials/resource-tables.md.
LITGPT: dict[str, Any] = {
    "id": "lit", "source": "github:Lightning-AI/litgpt@2685705:tutorials/resource-tables.md", "model": "Llama 2 7 B",
    "method": "adapter+bnb.nf4-dq", "quant": "bnb.nf4-dq", "n_gpus": 1, "gpu": "A100-SXM4-40GB", "sharding": "none",
    "seq_len": 1304, "micro_batch": 1, "grad_accum": 128, "grad_ckpt": "none", "optimizer": "paged_adamw (bnb)",
    "weights_dtype": "bf16-true", "compute_dtype": "bf16", "attention": "sdpa",
    "kernels": "litgpt model, chunked cross-entropy (128)", "packing": "no; longest sample sets the peak",
    "versions": "litgpt 8641822, torch 2.1.0, bitsandbytes 0.41.1", "peak_mem_gib": 11.5298,
    "peak_mem_kind": "torch max_memory_allocated", "oom": False,
}  # fmt: skip
# github.com/pytorch/torchtune, README.md, "Optimization flags" (peak memory active, of 4096 tokens a pack).
TUNE: dict[str, Any] = {
    "id": "tune", "source": "github:pytorch/torchtune:README.md", "model": "meta-llama/Llama-3.2-3B", "method": "full",
    "n_gpus": 1, "gpu": "A100-80GB", "sharding": "none", "offload": "none", "seq_len": 4096, "micro_batch": 2,
    "grad_accum": 1, "grad_ckpt": "none", "optimizer": "AdamW fused", "weights_dtype": "bf16", "compute_dtype": "bf16",
    "attention": "flex attention", "kernels": "none", "packing": "packed", "versions": "torchtune 0.4, torch 2.5.1",
    "peak_mem_gib": 60.0, "peak_mem_kind": "peak memory active", "oom": False,
}  # fmt: skip
CHUNKED = TUNE | {"kernels": "torch.compile, chunked cross-entropy (8)", "peak_mem_gib": 42.9}
OFFLOADED = CHUNKED | {
    "grad_ckpt": "full per layer", "optimizer": "AdamW fused, optimizer_in_bwd", "offload": "activations",
    "peak_mem_gib": 21.8,
}  # fmt: skip
# github.com/linkedin/Liger-Kernel, examples/huggingface/results/llama_use_liger_False_patching_type_None.log, steps 2 to
# 6: peaks of 39696, 41489 and 43281 MiB for batches that were padded to multiples of 16 tokens.
PADDED = TUNE | {
    "id": "liger", "source": "github:linkedin/Liger-Kernel:examples/huggingface/results",
    "model": "meta-llama/Meta-Llama-3-8B", "n_gpus": 4, "sharding": "FSDP full_shard auto_wrap (HF Trainer)",
    "seq_len": 256, "micro_batch": 32, "grad_ckpt": "full (fsdp_config activation_checkpointing)",
    "optimizer": "adamw_torch", "compute_dtype": "bf16 mixed", "attention": "sdpa", "packing": "no; padded",
    "versions": "torch 2.4, transformers 4.44", "peak_mem_gib": 39696.43 / 1024,
}  # fmt: skip
# github.com/AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md: LoRA on two RTX 3090, context of 2048.
ANSWER = FMS | {
    "id": "answer", "source": "github:AnswerDotAI/fsdp_qlora:benchmarks_03_2024.md", "model": "meta-llama/Llama-2-7b-hf",
    "n_gpus": 2, "gpu": "RTX 3090", "sharding": "FSDP FULL_SHARD", "seq_len": 2048, "micro_batch": 1,
    "grad_ckpt": "full, reentrant", "optimizer": "adamw", "attention": "sdpa", "versions": "torch 2.2", "lora_r": 64,
    "lora_targets": ["k_proj", "q_proj", "v_proj", "up_proj", "down_proj", "gate_proj"], "peak_mem_gib": 9.16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("row", "within"),
    [(TUNE, 0.004), (CHUNKED, 0.004), (OFFLOADED, 0.004), (PADDED, 0.002), (ANSWER, 0.02)],
    ids=["torchtune", "chunked", "offloaded", "padded", "fsdp_qlora"],
)
def test_peaks_of_other_sources(row: dict[str, Any], within: float) -> None:
    predicted = predict(setup_of(row)).allocated_bytes / GIB
    assert predicted == pytest.approx(row["peak_mem_gib"], rel=within)


def test_an_update_in_backward_holds_one_layers_gradients() -> None:
    fused = predict(setup_of(OFFLOADED))
    assert "gradients" not in {phase.name: phase for phase in fused.phases}["optimizer_step"].parts
    after = predict(setup_of(OFFLOADED | {"optimizer": "AdamW fused"}))
    assert after.allocated_bytes > fused.allocated_bytes


def test_deepspeed_keeps_the_gradients_of_a_rank_s_share() -> None:
    def update(stage: int) -> dict[str, int]:
        zero = PADDED | {"sharding": f"DeepSpeed ZeRO-{stage}", "grad_ckpt": "full", "compute_dtype": "bf16"}
        return dict({phase.name: phase for phase in predict(setup_of(zero)).phases}["optimizer_step"].parts)

    whole, share = update(1), update(2)
    assert whole["gradients"] == pytest.approx(4 * share["gradients"])
    assert share["temporaries"] == pytest.approx(2 * share["gradients"])  # fp32, of a share of 16-bit ones


@pytest.mark.parametrize("row", [FMS, FULL, FSDP, AMP_KERNELS, LITGPT], ids=["lora", "full", "fsdp", "kernels", "lit"])
def test_published_peaks(row: dict[str, Any]) -> None:
    predicted = predict(setup_of(row)).allocated_bytes / GIB
    assert predicted == pytest.approx(row["peak_mem_gib"], rel=0.004)


def test_what_sets_the_peak() -> None:
    assert predict(setup_of(FULL)).peak.name == "optimizer_step"
    assert predict(setup_of(FMS)).peak.moment == "loss"
    assert predict(setup_of(FSDP)).peak.moment == "backward of layer 0"  # every later layer's input is still held
    other = predict(setup_of(FSDP | {"grad_ckpt": "full per layer, use_reentrant=False"})).allocated_bytes
    assert other < predict(setup_of(FSDP)).allocated_bytes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"stack": "hf", "autocast": "", "adapters": "fp32", "reentrant": True, "loss": "hf"}),
        ({"compute_dtype": "amp fp16", "weights_dtype": "float16"}, {"autocast": "fp16", "weights": "fp16"}),
        ({"versions": "transformers 4.45.2"}, {"loss": "hf inline", "attention": "flash repeated"}),
        ({"kernels": "liger"}, {"loss": "liger", "norm": "fused", "rope": "fused", "mlp": "fused"}),
        ({"sharding": "DeepSpeed ZeRO-3", "n_gpus": 8}, {"sharding": "zero3", "sharded_by": 8}),
        ({"sharding": "FSDP2 32 x TP 8", "n_gpus": 256}, {"sharding": "fsdp2", "tensor_parallel": 8, "sharded_by": 32}),
        ({"offload": "activation offloading"}, {"offload": frozenset({"activations"})}),
        ({"offload": "cpu (params, optimizer)"}, {"offload": frozenset({"parameters", "optimizer"})}),
        ({"grad_ckpt": "none"}, {"checkpointing": "none"}),
        ({"optimizer": "paged_adamw_8bit"}, {"paged": True, "foreach": False, "state_bytes": 2.03}),
        ({"lora_targets": "all linear"}, {"targets": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}),
        ({"lora_targets": ["linear_qkv", "linear_fc2"]}, {"targets": ("q_proj", "k_proj", "v_proj", "down_proj")}),
        ({"grad_accum": 8}, {"accumulates": True}),
        ({"sharding": "FSDP1 + CPU offload", "n_gpus": 2}, {"offload": frozenset({"parameters", "optimizer"})}),
        ({"sharding": "FSDP SHARD_GRAD_OP", "n_gpus": 2}, {"sharding": "fsdp1", "shard_grad_op": True}),
        ({"sharding": "HSDP", "n_gpus": "2 nodes x 8"}, {"world": 16, "sharded_by": 8}),
        ({"sharding": "DeepSpeed ZeRO stage 2", "n_gpus": "8x"}, {"sharding": "zero2", "world": 8}),
        ({"grad_ckpt": False}, {"checkpointing": "none"}),
        ({"grad_ckpt": "activation checkpointing (non-reentrant)"}, {"checkpointing": "full", "reentrant": False}),
        ({"grad_ckpt": "unsloth offloaded"}, {"checkpointing": "full", "offload": frozenset({"activations"})}),
        ({"optimizer": "AdamW4bit"}, {"state_bytes": 1.0625}),
        ({"optimizer": "sgd"}, {"moments": 0, "foreach": False}),
        ({"optimizer": "PagedAdamW8bit, step in backward"}, {"in_backward": True, "paged": True}),
        ({"kernels": "liger FLCE + RMSNorm"}, {"loss": "liger", "norm": "fused", "rope": "eager", "mlp": "eager"}),
        ({"kernels": "cut cross entropy"}, {"loss": "cce", "norm": "eager"}),
        ({"attention": None, "kernels": "none"}, {"attention": "sdpa"}),
        ({"quant": "bnb-nf4 (no double quant)"}, {"quant": "nf4"}),
        ({"seq_len": "2,048", "micro_batch": "2"}, {"seq_lens": (2048, 2048)}),
        ({"versions": "transformers 4.38, peft 0.8"}, {"adapters": "bf16", "loss": "hf inline"}),
        ({"versions": "torchtune 0.4", "kernels": "torch.compile, chunked CE"}, {"loss": "chunked compiled"}),
        ({"source": "github:pytorch/torchtitan:h200_202506.md", "kernels": "torch.compile"}, {"loss": "plain compiled"}),
    ],
)  # fmt: skip
def test_words_become_settings(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    setup = setup_of(FMS | changes)
    assert {name: getattr(setup, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "nobody/unheard-of-5b"}, "architecture not known: nobody/unheard-of-5b"),
        ({"method": "galore"}, "method galore"),
        ({"optimizer": "adafactor"}, "optimizer adafactor"),
        ({"seq_len": None}, "micro-batch or sequence length not given"),
        ({"lora_r": None}, "LoRA rank not given"),
        ({"model": "mistralai/Mixtral-8x7B-v0.1"}, "mixture of experts"),
        ({"quant": "gptq 4-bit"}, "quantisation gptq 4-bit"),
        ({"grad_ckpt": None}, "activation checkpointing not given"),
        ({"grad_ckpt": "every 2 layers"}, "activation checkpointing every 2 layers"),
        ({"quant": "int8"}, "quantisation int8"),
        ({"method": "dora"}, "method dora"),
        ({"offload": "disk"}, "offload disk"),
        ({"sharding": "TP 4 x PP 2", "n_gpus": 8}, "pipeline parallelism"),
        ({"sharding": None, "n_gpus": 8}, "sharding over several GPUs not given"),
    ],
)
def test_what_decides_memory_and_is_not_known_is_a_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unmapped, match=f"^{reason}$"):
        setup_of(FMS | changes)


def test_lengths_that_vary_are_a_reason_only_where_they_decide() -> None:
    vary = {"notes": "sequence lengths vary (<=4096)"}
    assert predict(setup_of(FULL | vary)).allocated_bytes / GIB == pytest.approx(67.46, rel=0.002)
    with pytest.raises(Unmapped, match="lengths vary"):
        predict(setup_of(FMS | vary))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("torch max_memory_allocated", "allocated"), ("peak_memory_active", "allocated"),
        ("torch max reserved", "reserved"), ("nvidia-smi memory.used", "nvml"), ("", "unknown"),
    ],
)  # fmt: skip
def test_counters(kind: str, expected: str) -> None:
    assert counter({"peak_mem_kind": kind}) == expected


def test_no_row_is_dropped_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    too_large = FULL | {"id": "70b", "model": "NousResearch/Llama-2-70b-hf", "oom": True}
    del too_large["peak_mem_gib"]
    nvml = {"mem2_gib": 28.8828, "mem2_kind": "nvidia-smi memory.used"}
    rows = [FMS | nvml, FULL, too_large, FMS | {"method": "galore"}, FMS | {"model": "nobody/unheard-of-5b"}]
    points = tmp_path / "points.yaml"
    points.write_text(yaml.safe_dump(rows))
    plan_accuracy.main(["--points", str(points), "--json", "--docs", str(tmp_path / "page.md")])
    result = json.loads(capsys.readouterr().out)
    name = "foundation-model-stack/fms-acceleration a100_80gb.csv"
    allocated = result["families"][f"{name} (allocated)"]
    assert (allocated["counter"], allocated["rows"], allocated["mapped"]) == ("allocated", 4, 2)
    assert 0 < allocated["median_abs_error"] <= allocated["p90"] <= allocated["worst"] < 0.002
    assert result["families"][f"{name} (nvml)"]["within_band"] == 1.0
    assert result["unmapped"] == {"method galore": 1, "architecture not known: nobody/unheard-of-5b": 1}
    assert (result["rows"], result["mapped"]) == (5, 3)
    fits = result["fits"]
    assert (fits["fits_called_fits"], fits["oom_called_oom"], fits["miscalled"]) == (2, 1, [])
    page = (tmp_path / "page.md").read_text()
    assert f"| {name} (allocated) | 4 | 2 |" in page
    assert "- 1: method galore" in page


def test_a_table_without_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = tmp_path / "points.yaml"
    points.write_text(yaml.safe_dump({"points": [LITGPT]}))
    plan_accuracy.main(["--points", str(points)])
    shown = capsys.readouterr().out
    assert "Lightning-AI/litgpt resource-tables.md (allocated)" in shown
    assert "mapped: 1 of 1 rows" in shown


def test_throughput_of_several_gpus_from_that_of_one() -> None:
    one = FMS | {"tokens_per_s_per_gpu": 3324.155}
    several = FSDP | {"micro_batch": 4, "tokens_per_s_per_gpu": 3168.613, "peak_mem_gib": 20.4517}
    result = summary(score([one, several]))["throughput"]
    assert (result["rows"], result["mapped"]) == (1, 1)
    assert result["median_abs_error"] < 0.06


def test_a_recorded_unit_marks_its_passes() -> None:
    """An adapter in a checkpointed layer: forward; forward again, backward, and its weight's gradient."""
    setup = setup_of(FMS)
    tape = tape_of_work(setup)
    forward, backward = tape.forward[1], tape.backward[1]
    units = 2 * len(setup.targets)
    assert [m for _, m in forward.stretches] == ["open", "close"] * units + ["end"]
    found = Counter(m for _, m in backward.stretches)
    assert found == {"open": 2 * units, "close": units, "reduce": units, "end": 1}
    for segment in (forward, backward):
        assert sum((w for w, _ in segment.stretches), Work()) == segment.work


def test_families_are_tables() -> None:
    assert family({"source": "https://www.example.org/tables/memory.html (2024)"}) == "example.org/tables/memory.html"
