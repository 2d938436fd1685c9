"""Bytes and seconds that follow from sizes and settings alone, worked out by hand: no step is run, nothing is traced."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sft_dist.config.schema import ActivationCheckpointingConfig
from sft_dist.hardware.gpus import find_gpu
from sft_dist.hardware.networks import find_network
from sft_dist.model.cpu_attention import packed_attention_backward
from sft_dist.model.spec import ParameterSpec
from sft_dist.plan import activations, cache
from sft_dist.plan.activations import seq_lens_of, trace
from sft_dist.plan.disk import final_bytes, num_checkpoints, saved_state_bytes
from sft_dist.plan.host import PROCESS_BYTES, host_parts
from sft_dist.plan.launches import FSDP2
from sft_dist.plan.memory import (
    CONTEXT_BYTES,
    NCCL_BYTES,
    allocated_range,
    context_bytes,
    memory_phases,
    reserved_range,
    resident_parts,
    verdict,
)
from sft_dist.plan.offload import host_transfers, update_seconds, update_traffic_bytes
from sft_dist.plan.operators import inner_bytes
from sft_dist.plan.rates import DISK_BYTES_PER_S, gpu_rates, link_share
from sft_dist.plan.record import recording
from sft_dist.plan.result import DataPlan, Phase, PhaseName, Range
from sft_dist.plan.schedule import Transfer, step_time
from sft_dist.plan.tape import PARTS, Segment, Tape, TapePart, Work
from sft_dist.plan.time import START_S, evaluation_seconds, run_time
from sft_dist.plan.update import update_bytes
from sft_dist.plan.workload import workload
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.collectives import collectives
from tests.helpers import cells
from tests.helpers.tiny_model import build_base

A100 = find_gpu("A100-SXM-80GB")

# Higher than anything that a strategy takes: the moment of this segment is the highest one.
SPIKE = 10**12


def run_of(
    base: Path,
    strategy: str,
    method: str = "full",
    *,
    nodes: int = 1,
    ranks: int = 3,
    compute: str = "bf16",
    **sections: Any,
) -> Run:
    sections["precision"] = {"compute": compute, **sections.get("precision", {})}
    sections.setdefault("train", {"global_batch_size": 12, "micro_batch_size": 2, "max_steps": 6})
    return resolve(cells.config(str(base), method, strategy, **sections), WorldShape(nodes, ranks))


def tape_of(run: Run, at: str = "", *, flops: int = 0) -> Tape:
    """Of segments that keep nothing; the one named ``at`` takes ``SPIKE`` bytes for a moment."""

    def segment(name: str, part: TapePart = "activations") -> Segment:
        sizes = [SPIKE, -SPIKE] if name == at else []
        numbers = (np.array(sizes, np.int64), np.full(len(sizes), PARTS.index(part), np.int64))
        return Segment(name, *numbers, Work(product_flops=flops, kernels=1))

    blocks = range(run.model.num_layers)
    return Tape(
        embed=segment("embed"),
        forward=tuple(segment(f"forward {i}") for i in blocks),
        head=segment("head"),
        head_backward=segment("head backward"),
        backward=tuple(segment(f"backward {i}") for i in blocks),
        embed_backward=segment("embed backward"),
        recorded=tuple(blocks),
        saved_bytes=(0,) * (run.model.num_layers + 1),
    )


def phases_of(run: Run, at: str = "", eval_at: str | None = None) -> dict[PhaseName, Phase]:
    eval_tape = None if eval_at is None else tape_of(run, eval_at)
    return {phase.name: phase for phase in memory_phases(run, tape_of(run, at), eval_tape)}


def padded(parameters: list[ParameterSpec], shards: int) -> int:
    """Elements, with rows for every rank alike."""
    return sum(-(-p.shape[0] // shards) * shards * (p.numel // p.shape[0]) for p in parameters)


def units(run: Run, shards: int) -> tuple[int, int]:
    """Elements of what is outside the blocks and of a block."""
    return padded(run.model.members[None], shards), padded(run.model.members[run.model.blocks[0]], shards)


def numel(run: Run) -> int:
    return sum(p.numel for p in run.model.parameters)


# Memory of a device


@pytest.mark.parametrize(("ranks", "replicas"), [(3, 1), (6, 2)])
def test_what_fsdp2_has_gathered_and_reduces(tiny_base: Path, ranks: int, replicas: int) -> None:
    """Three shards, by which nothing divides; two layers, so that in backward of the last the first is on its way."""
    train = {"global_batch_size": 2 * ranks, "micro_batch_size": 2}
    run = run_of(tiny_base, "fsdp2", ranks=ranks, sharding={"strategy": "fsdp2", "dp_replicate": replicas}, train=train)
    root, block = units(run, 3)
    assert root + 2 * block > numel(run)

    def parts(at: str) -> dict[Any, int]:
        return phases_of(run, at)["forward_backward"].parts

    in_forward = parts("forward 1")
    assert in_forward["gather_buffers"] == 2 * (root + 2 * block), "the layer, and the buffer that it came from"
    assert parts("head")["gather_buffers"] == 2 * (root + block), "the last layer's buffer"
    last, first = parts("backward 1"), parts("backward 0")
    assert last["gather_buffers"] == 2 * (root + 2 * block), "the layer, and the next one's buffer"
    assert "communication" not in last
    assert first["gather_buffers"] == 2 * (root + block)
    assert first["communication"] == 4 * block, "the last layer's gradients are reduced in fp32"
    assert first["gradients"] == 4 * block // 3
    assert parts("embed backward")["gradients"] == 2 * 4 * block // 3
    assert run.precision.reduce == "fp32"
    train["global_batch_size"] *= 3
    several = run_of(tiny_base, "fsdp2", ranks=ranks, sharding=run.sharding.model_dump(), train=train)
    accumulated = phases_of(several, "backward 0")
    phases = accumulated["forward_backward"], accumulated["optimizer_step"]
    for phase in phases:
        assert phase.parts["gradients"] == 4 * (root + 2 * block) // 3


@pytest.mark.parametrize(
    ("ranks", "precision", "held"),
    [
        (1, {}, 0),
        (2, {}, 4),
        (1, {"reduce": "bf16"}, 4),  # rounded by the reducer
        (1, {"master": "bf16", "reduce": "fp32"}, 0),
        (2, {"master": "bf16", "reduce": "fp32"}, 2),
    ],
)
def test_a_single_rank_holds_no_gradients_between_steps(
    tiny_base: Path, ranks: int, precision: dict[str, str], held: int
) -> None:
    run = run_of(tiny_base, "ddp", ranks=ranks, precision=precision)
    assert resident_parts(run)["gradients"] == held * numel(run)
    assert phases_of(run, eval_at="head")["eval"].parts.get("communication", 0) == 0


def test_gradients_are_reduced_in_their_own_width(tiny_base: Path) -> None:
    run = run_of(tiny_base, "fsdp2", precision={"reduce": "bf16"})
    _, block = units(run, 3)
    assert phases_of(run, "backward 0")["forward_backward"].parts["communication"] == 2 * block
    ddp = run_of(tiny_base, "ddp", precision={"reduce": "bf16"})
    assert phases_of(ddp, "backward 0")["forward_backward"].parts["communication"] == 2 * numel(ddp)


def test_weights_that_stay_gathered(tiny_base: Path) -> None:
    run = run_of(tiny_base, "fsdp2", sharding={"strategy": "fsdp2", "reshard_after_forward": False})
    root, block = units(run, 3)
    assert phases_of(run, "backward 1")["forward_backward"].parts["gather_buffers"] == 2 * (root + 2 * block)
    assert phases_of(run, "", "head")["eval"].parts["gather_buffers"] == 2 * (root + 3 * block)


def test_an_evaluation_gathers_too(tiny_base: Path) -> None:
    run = run_of(tiny_base, "fsdp2")
    root, block = units(run, 3)
    phase = phases_of(run, "", "forward 1")["eval"]
    assert phase.parts["gather_buffers"] == 2 * (root + 2 * block)
    assert phase.parts["activations"] == SPIKE
    assert phase.parts["optimizer"] == resident_parts(run)["optimizer"]
    assert "eval" not in phases_of(run)


def test_ranks_have_a_context_of_nccl(tiny_base: Path) -> None:
    for ranks, expected in ((1, CONTEXT_BYTES), (2, CONTEXT_BYTES + NCCL_BYTES)):
        run = run_of(tiny_base, "ddp", ranks=ranks)
        assert context_bytes(run) == expected
        for name, phase in phases_of(run, "", "head").items():
            assert phase.parts["context"] == expected, name
            assert phase.total_bytes - phase.allocated_bytes == expected


def test_loading_and_saving(tiny_base: Path) -> None:
    """Under DDP everything is there; else the largest parameter comes together, as it is and once more."""
    largest = 259 * 64
    for strategy, precision, width in (("ddp", {}, 0), ("fsdp2", {}, 4), ("fsdp2", BF16_MASTERS, 2), ("zero2", {}, 4)):
        run = run_of(tiny_base, strategy, precision=precision)
        phases = phases_of(run)
        assert phases["save"].parts.get("gather_buffers", 0) == 2 * largest * width
        assert {"optimizer", "gradients"}.isdisjoint(phases["load"].parts)
        assert phases["load"].parts["weights"] == resident_parts(run)["weights"]
    shard = -(-64 // 3) * 256 * 4  # of the second product of an MLP: a third of its 64 rows is 22
    assert phases_of(run_of(tiny_base, "fsdp2"))["load"].parts["gather_buffers"] == shard


BF16_MASTERS = {"master": "bf16", "reduce": "bf16", "optimizer_state": "bf16"}


def test_what_an_update_takes_for_a_moment(tiny_base: Path) -> None:
    """The fused AdamW nothing; where dtypes differ the largest parameter in fp32; DeepSpeed its flat gradients."""
    largest = 259 * 64
    assert update_bytes(run_of(tiny_base, "ddp")) == 0
    mixed = run_of(tiny_base, "ddp", precision=BF16_MASTERS)
    assert update_bytes(mixed) >= 2 * 4 * largest
    assert phases_of(mixed)["optimizer_step"].parts["temporaries"] == update_bytes(mixed)
    zero2, zero3 = run_of(tiny_base, "zero2", ranks=2), run_of(tiny_base, "zero3", ranks=2)
    assert update_bytes(zero2) == pytest.approx(4 * numel(zero2) / 2, rel=0.01)
    assert update_bytes(zero3) == pytest.approx(4 * numel(zero3) / 2, rel=0.01)
    small = {"strategy": "zero3", "deepspeed_config": {"zero_optimization": {"sub_group_size": 1000}}}
    assert update_bytes(run_of(tiny_base, "zero3", ranks=2, sharding=small)) == 4000
    assert update_bytes(run_of(tiny_base, "fsdp2", precision=BF16_MASTERS, sharding=ON_HOST)) == 0


def test_buckets_of_zero(tiny_base: Path) -> None:
    """Of so many elements as the file states: in what is computed in until they are reduced in fp32."""

    def buckets(strategy: str, **knobs: Any) -> int:
        sharding = {"strategy": strategy, "deepspeed_config": {"zero_optimization": knobs}}
        run = run_of(tiny_base, strategy, sharding=sharding, precision={"reduce": "fp32"})
        return phases_of(run, "backward 0")["forward_backward"].parts["communication"]

    size = 1000
    assert buckets("zero2", reduce_bucket_size=size, overlap_comm=False) == (2 + 2 * 4) * size
    assert buckets("zero2", reduce_bucket_size=size, overlap_comm=True) == (2 * 2 + 2 * 4) * size
    assert buckets("zero3", reduce_bucket_size=size) == (4 + 4) * size


def test_what_stage_3_has_gathered(tiny_base: Path) -> None:
    knobs = {"stage3_max_live_parameters": 20_000, "stage3_prefetch_bucket_size": 1000}
    run = run_of(tiny_base, "zero3", sharding={"strategy": "zero3", "deepspeed_config": {"zero_optimization": knobs}})
    gathered = phases_of(run, "backward 0")["forward_backward"].parts["gather_buffers"]
    assert gathered == 2 * (20_000 + 1000 + 259 * 64), "and the buffer of the largest parameter"
    everything = run_of(tiny_base, "zero3")
    whole = phases_of(everything, "backward 0")["forward_backward"].parts["gather_buffers"]
    assert whole == 2 * 2 * numel(everything)


def test_what_kernels_take_that_no_trace_sees() -> None:
    """FlashAttention-2 pads a head of 48 to 64; two of four query heads share a key."""
    logits = torch.empty(100, 259)
    assert inner_bytes(torch.ops.aten.logsumexp.default, [logits]) == 100 * 259 * 4
    query, key = torch.empty(100, 4, 48, dtype=torch.bfloat16), torch.empty(100, 2, 48, dtype=torch.bfloat16)
    backward = packed_attention_backward._opoverload
    accumulated, expanded = 4 * (100 + 128) * 4 * (64 + 1), 2 * 100 * 4 * 48 * 2
    assert inner_bytes(backward, [query, query, key, key]) == accumulated + expanded
    assert inner_bytes(backward, [query, query, query, query]) == accumulated
    assert inner_bytes(torch.ops.aten.mm.default, [logits, logits]) == 0


def test_requests_are_rounded_as_the_allocator_does() -> None:
    with FakeTensorMode(), recording() as recorder:
        kept = torch.ones(3), torch.ones(129)
        del kept
    assert recorder.take("embed").peak_bytes == 512 + 1024


def test_verdicts_and_ranges() -> None:
    assert [verdict(share, 1000) for share in (900, 901, 930, 931)] == ["fits", "tight", "tight", "does not fit"]
    phases = (Phase("load", {"weights": 500, "context": 90}), Phase("save", {"weights": 100, "context": 400}))
    allocated = allocated_range(phases)
    assert (allocated.value, allocated.low, allocated.high) == (500, pytest.approx(485), pytest.approx(515))
    reserved = reserved_range(allocated, 90, 10_000)
    assert (reserved.value, reserved.low, reserved.high) == pytest.approx((665, 575, 862.5))
    full = reserved_range(allocated, 90, 600)
    assert (full.value, full.low, full.high) == pytest.approx((600, 575, 600)), "the allocator gives back what it can"


# Host memory


ON_HOST = {"strategy": "fsdp2", "cpu_offload": True}


def test_host_memory_is_that_of_all_ranks_of_a_node(tiny_base: Path) -> None:
    """Two nodes of four: half of every state is on a node."""
    run = run_of(tiny_base, "fsdp2", nodes=2, ranks=4, sharding=ON_HOST)
    parts = host_parts(run)
    assert parts["processes"] == 4 * PROCESS_BYTES
    assert parts["offloaded states"] == pytest.approx((4 + 4 + 8) * numel(run) / 2, rel=0.02)
    assert parts["weights on their way"] == pytest.approx(4 * 259 * 64 * 4 / 8, rel=0.02)
    held = resident_parts(run)
    assert held["weights"] == held["optimizer"] == held["gradients"] == 0, "nothing of it is on a device"
    knobs = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    sharding = {"strategy": "zero2", "deepspeed_config": knobs}
    zero = run_of(tiny_base, "zero2", nodes=2, ranks=4, sharding=sharding)
    assert host_parts(zero)["offloaded states"] == pytest.approx((4 + 4 + 8) * numel(zero) / 2, rel=0.02)
    assert resident_parts(zero)["optimizer"] == 0
    assert resident_parts(zero)["weights"] == 2 * numel(zero)


def test_paged_states_are_in_host_memory_alone(tiny_base: Path) -> None:
    run = run_of(tiny_base, "ddp", nodes=2, ranks=4, optim={"type": "adamw", "paged": True})
    assert host_parts(run)["paged states"] == 4 * 8 * numel(run)
    assert resident_parts(run)["optimizer"] == 0
    assert "optimizer" not in phases_of(run)["optimizer_step"].parts


def test_offloaded_inputs_of_layers(tiny_base: Path) -> None:
    wanted = {"mode": "full", "offload": True}
    run = run_of(tiny_base, "fsdp2", nodes=2, ranks=4, activation_checkpointing=wanted)
    tokens = 2 * 48
    assert host_parts(run)["offloaded activations"] == 4 * 2 * tokens * 64 * 2, "of four ranks, of two layers"
    assert "offloaded activations" not in host_parts(run_of(tiny_base, "fsdp2", nodes=2, ranks=4))


def test_what_fsdp2_copies_out_of_and_into_the_buffers_of_its_collectives(tiny_base: Path) -> None:
    """In bf16: gathered weights there and into their own places; gradients in bf16 into a buffer of fp32."""
    run = run_of(tiny_base, "fsdp2", ranks=3)
    _, block = units(run, 3)
    assert {(c.of, c.kind): c.copied_bytes for c in collectives(run) if c.block == 0} == {
        ("forward", "all_gather"): 4 * block, ("backward", "all_gather"): 4 * block,
        ("backward", "reduce_scatter"): 6 * block,
    }  # fmt: skip
    # Three micro-batches: to fp32, two times bf16 added to it, and into the buffer.
    once = {"strategy": "fsdp2", "reduce_once_a_step": True}
    train = {"global_batch_size": 18, "micro_batch_size": 2}
    waits = run_of(tiny_base, "fsdp2", ranks=3, sharding=once, train=train)
    assert waits.batch.gradient_accumulation_steps == 3
    (reduced,) = [c for c in collectives(waits) if c.block == 0 and c.kind == "reduce_scatter"]
    assert (reduced.every, reduced.copied_bytes) == ("last_micro_batch", (6 + 2 * 10 + 8) * block)
    alone = run_of(tiny_base, "fsdp2", ranks=3, sharding=once, train=train | {"global_batch_size": 6})
    (reduced,) = [c for c in collectives(alone) if c.block == 0 and c.kind == "reduce_scatter"]
    assert reduced.copied_bytes == 6 * block, "a single micro-batch is reduced as it comes"


# Seconds


def of(copies: tuple[Transfer, ...], which: str) -> float:
    return sum(copy.seconds for copy in copies if copy.of == which)


def test_what_goes_over_the_link_to_the_host(tiny_base: Path) -> None:
    """FSDP2: fp32 shards there and gradients back; ZeRO: gradients there in fp32 and weights back in bf16."""
    run = run_of(tiny_base, "fsdp2", ranks=2, sharding=ON_HOST)
    root = sum(p.numel for p in run.model.members[None])
    copies = host_transfers(run, tokens=100)
    assert of(tuple(c for c in copies if c.when == "before"), "forward") == 4 * numel(run) / 2
    assert of(tuple(c for c in copies if c.when == "before"), "backward") == 4 * (numel(run) - root) / 2
    assert of(tuple(c for c in copies if c.when == "after"), "backward") == 4 * numel(run) / 2
    assert {c.every for c in copies if c.when == "before" and c.block is None} == {"first_micro_batch"}
    assert {c.every for c in copies if c.when == "before" and c.block is not None} == {"micro_batch"}
    kept = run_of(tiny_base, "fsdp2", ranks=2, sharding=ON_HOST | {"reshard_after_forward": False})
    there = [c for c in host_transfers(kept, tokens=100) if c.when == "before"]
    assert {(c.of, c.every) for c in there} == {("forward", "first_micro_batch")}, "layers stay for the step"
    for once, when in ((False, "micro_batch"), (True, "last_micro_batch")):
        waits = run_of(tiny_base, "fsdp2", ranks=2, sharding=ON_HOST | {"reduce_once_a_step": once})
        assert {c.every for c in host_transfers(waits, tokens=100) if c.when == "after"} == {when}
    knobs = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    zero = run_of(tiny_base, "zero2", ranks=2, sharding={"strategy": "zero2", "deepspeed_config": knobs})
    copies = host_transfers(zero, tokens=100)
    assert (of(copies, "forward"), of(copies, "backward")) == (0, 4 * numel(zero) / 2)
    assert of(copies, "step") == 2 * numel(zero) / 2
    inputs = run_of(tiny_base, "ddp", activation_checkpointing={"mode": "full", "offload": True})
    copies = host_transfers(inputs, tokens=100)
    assert of(copies, "forward") == of(copies, "backward") == 2 * 100 * 64 * 2
    assert host_transfers(run_of(tiny_base, "ddp"), tokens=100) == ()


def test_what_an_update_reads_and_writes(tiny_base: Path) -> None:
    """Of each parameter: 4 passes over 4 bytes of gradient, two over 4 of weight and two over 8 of moments."""
    run = run_of(tiny_base, "ddp")
    assert update_traffic_bytes(run) == (4 * 4 + 2 * 4 + 2 * 8) * numel(run)
    unclipped = run_of(tiny_base, "ddp", optim={"max_grad_norm": None})
    assert update_traffic_bytes(unclipped) == (2 * 4 + 2 * 4 + 2 * 8) * numel(run)
    zero = run_of(tiny_base, "zero1", ranks=2)
    assert update_traffic_bytes(zero) == pytest.approx((4 * 4 + 2 * 4 + 2 * 8 + 4 + 2) * numel(run) / 2, rel=0.01)
    rates = gpu_rates(A100, dtype="bf16", gpus_per_node=2)
    on_host = run_of(tiny_base, "fsdp2", ranks=2, sharding=ON_HOST)
    assert update_seconds(on_host, rates) == update_traffic_bytes(on_host) / 75e9, "half of the host's memory rate"
    assert update_seconds(run, rates) == update_traffic_bytes(run) / rates.memory_bytes_per_s


def test_what_of_rates_is_reached() -> None:
    nvlink, peers, no_peers = A100.link, A100.host_link, find_gpu("rtx4090").link
    assert (link_share(nvlink), link_share(peers), link_share(no_peers)) == (0.77, 0.75, 0.375)
    network = find_network("infiniband-ndr")
    rates = gpu_rates(A100, dtype="bf16", gpus_per_node=8, network=network)
    links = rates.links
    assert links.network_bytes_per_s == 0.8 * network.bytes_per_s
    assert links.node_bytes_per_s == 0.77 * A100.link_bytes_per_s(8)
    assert rates.product_flops_per_s == A100.achievable_flops["bf16"]
    assert rates.attention_flops_per_s == 0.65 * rates.product_flops_per_s
    assert rates.memory_bytes_per_s == 0.85 * A100.memory_bandwidth


def data_of(run: Run, **changes: Any) -> DataPlan:
    """120 full sequences, of which a run takes 6 steps of 12; 3 evaluations of 1000 tokens."""
    tokens = 120 * 48.0
    plan = DataPlan(
        "sampled", 120, Range(tokens, tokens, tokens), tokens, 120, tokens * 48, 1.0, 0.0, steps=6, epochs=0.6,
        micro_batches_per_step=2, tokens_per_step=12 * 48.0, eval_tokens=1000.0, evaluations=3, cache_bytes=0, source="",
    )  # fmt: skip
    return replace(plan, **changes)


def test_what_is_beside_training(tiny_base: Path) -> None:
    run = run_of(tiny_base, "fsdp2", ranks=2, train={"global_batch_size": 12, "micro_batch_size": 3, "max_steps": 6})
    run = replace(run, checkpoint=run.checkpoint.model_copy(update={"every_steps": 2}))
    data = data_of(run)
    assert num_checkpoints(run, data) == 3
    work = workload(run, tape_of(run, flops=10**9), data=data, eval_tape=tape_of(run, flops=10**9))
    assert work.evaluation is not None
    assert work.evaluation.batches == 4, "1000 tokens, of which 2 ranks take 3 rows of 48 at a time"
    assert {c.kind for c in work.evaluation.collectives} == {"all_gather"}, "an evaluation gathers the weights"
    timed = run_time(work, gpu=A100)
    phases, rest = timed.phases, sum(timed.phases.values()) - timed.phases["train"]
    assert phases["load"] == START_S + 2 * numel(run) / DISK_BYTES_PER_S
    assert phases["prepare"] == data.tokens.value / 1e6
    assert phases["train"] == pytest.approx(6 * timed.step_range.value)
    written = num_checkpoints(run, data) * saved_state_bytes(run) + final_bytes(run)
    assert phases["save"] == written / DISK_BYTES_PER_S
    rates = gpu_rates(A100, dtype="bf16", gpus_per_node=2, efficiency=timed.efficiency.range.value)
    forward = step_time(
        work.evaluation.tape, rates=rates, collectives=work.evaluation.collectives, micro_batches=1, units=FSDP2,
        backward=False,
    ).total_s  # fmt: skip
    assert evaluation_seconds(work.evaluation, rates, units=FSDP2) == 4 * forward
    assert phases["eval"] == pytest.approx(3 * 4 * forward)
    assert timed.total.value == pytest.approx(sum(phases.values()))
    assert timed.total.low == pytest.approx(6 * timed.step_range.low + rest / 2)
    assert timed.total.high == pytest.approx(6 * timed.step_range.high + rest * 2)
    prepared = workload(run, tape_of(run), data=data_of(run, basis="prepared"))
    assert run_time(prepared, gpu=A100).phases["prepare"] == 0


# What is kept of earlier plans


def test_a_tape_is_kept_for_runs_that_would_record_the_same(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes the tape changes the key; the number of ranks does not."""
    plain = cache._plain(tape_of(run_of(tiny_base, "ddp")))
    keys: list[str] = []

    def kept(key: list[Any]) -> Any:
        keys.append(json.dumps(key, sort_keys=True))
        return plain

    monkeypatch.setattr(cache, "_read", kept)
    run = run_of(tiny_base, "fsdp2")
    recomputing = [
        replace(run, activation_checkpointing=ActivationCheckpointingConfig(mode=m)) for m in ("none", "selective")
    ]
    others = [
        *recomputing,
        replace(run, activation_checkpointing=ActivationCheckpointingConfig(mode="full", offload=True)),
        replace(run, batch=replace(run.batch, micro_batch_size=1)),
        replace(run, batch=replace(run.batch, max_seq_len=32)),
        replace(run, batch=replace(run.batch, sequence_parallel=2)),
        run_of(tiny_base, "fsdp2", compute="fp32"),
        run_of(tiny_base, "fsdp2", "lora"),
        run_of(tiny_base, "ddp"),
        run_of(tiny_base, "ddp", precision=BF16_MASTERS),
    ]
    for each in (run, *others):
        cache.cached_trace(each)
    cache.cached_trace(run, backward=False)
    assert len(set(keys)) == len(keys) == len(others) + 2
    cache.cached_trace(run_of(tiny_base, "fsdp2", ranks=4))
    assert keys[-1] == keys[0]


def test_the_model_that_was_described_is_the_one_that_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building one of 80 layers takes a tenth of a plan's time; the tape is that of one which was built for it."""
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path / "cache"))
    base = build_base(tmp_path / "base", num_layers=5)
    run = resolve(cells.config(str(base), "lora", "fsdp2"), WorldShape(1, 3), describe=cache.cached_describe)
    with monkeypatch.context() as patch:
        patch.setattr(activations, "build_model", None)
        recorded = cache._plain(trace(run))
    again = replace(run, model=replace(run.model))
    assert again.model is not run.model
    assert cache._plain(trace(again)) == recorded


# What a tape keeps


def kept_by_a_middle_layer(folder: Path, checkpointing: dict[str, Any], *, backward: bool = True) -> tuple[int, int]:
    """Bytes of activations that stay behind its forward, and those of its input."""
    base = build_base(folder, num_layers=4)
    run = run_of(base, "fsdp2", ranks=2, activation_checkpointing=checkpointing)
    recorded = trace(run, backward=backward)
    inputs = sum(seq_lens_of(run)) * run.model.hidden_size * 2
    return recorded.forward[recorded.recorded[1]].net["activations"], inputs


def test_what_is_on_the_host_is_not_kept_on_the_device(tmp_path: Path) -> None:
    kept, inputs = kept_by_a_middle_layer(tmp_path, {"mode": "full"})
    assert kept == inputs
    assert kept_by_a_middle_layer(tmp_path, {"mode": "full", "offload": True})[0] == 0


def test_an_evaluation_keeps_nothing_for_a_backward(tmp_path: Path) -> None:
    assert kept_by_a_middle_layer(tmp_path, {"mode": "none"}, backward=False)[0] == 0
    kept, inputs = kept_by_a_middle_layer(tmp_path, {"mode": "none"})
    assert kept > 10 * inputs
