"""Seconds of a step: the work is what a real step does, and the arithmetic around it holds together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from sft_dist.data.loader import collate
from sft_dist.errors import PlanError
from sft_dist.hardware.gpus import find_gpu
from sft_dist.hardware.networks import find_network
from sft_dist.model.cpu_attention import packed_attention
from sft_dist.plan import calibration
from sft_dist.plan.activations import trace
from sft_dist.plan.calibration import Calibration, calibration_key
from sft_dist.plan.launches import FSDP1, FSDP2, Host
from sft_dist.plan.operators import attended_pairs
from sft_dist.plan.rates import Links, Rates, gpu_rates
from sft_dist.plan.result import DataPlan, Range, TimePlan
from sft_dist.plan.schedule import communication_seconds, step_time
from sft_dist.plan.tape import Segment, Tape, Work
from sft_dist.plan.time import plan_time
from sft_dist.plan.typical import Content, as_content, pairs_per_token, window_of
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.collectives import Collective, Every, Group, collectives
from tests.helpers import cells

A100 = find_gpu("A100-SXM-80GB")


def test_flops_of_attention_are_counted_pair_by_pair() -> None:
    """Two products forward and five backward of 8 numbers, for 4 heads and the 10 + 15 pairs of rows of 4 and 5."""
    query, key, value = (torch.randn(9, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    with FlopCounterMode(display=False) as counter:
        packed_attention(query, key, value, (4, 5), 0.3, 0)[0].sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (10 + 15) * 4 * 8


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def planned(
    base: Path,
    method: str | dict[str, Any] = "full",
    strategy: str = "fsdp2",
    shape: WorldShape | None = None,
    **sections: Any,
) -> Run:
    settings = {"train": {"global_batch_size": 48, "micro_batch_size": 2, "max_steps": 10}, **sections}
    return resolve(cells.config(str(base), method, strategy, **settings), shape or WorldShape())


def data_of(run: Run, *, sequences: int = 960, fill: float = 1.0, segment: float | None = None) -> DataPlan:
    length = run.batch.max_seq_len
    tokens = sequences * length * fill
    steps = run.num_steps(sequences)
    return DataPlan(
        "prepared", sequences, Range(tokens, tokens, tokens), tokens, sequences, tokens * (segment or length), fill, 0.0,
        steps, 1.0, run.batch.micro_batches(min(run.batch.global_batch_size, sequences)),
        tokens / run.batch.steps_per_epoch(sequences), 0.0, 0, 0, "test",
    )  # fmt: skip


# Work


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_planned_flops_are_those_of_a_real_step(tiny_base: Path, group_of_one: None, method: str, mode: str) -> None:
    """Packed segments of uneven lengths, counted by torch while the trainer's own model runs on real numbers."""
    run, strategy = cells.start(cells.config(str(tiny_base), method, "ddp", activation_checkpointing={"mode": mode}))
    data = cells.synthetic_data(rows=12)
    batch = collate(data, [0, 1, 2, 3])
    with FlopCounterMode(display=False) as counter:
        strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
    tape = trace(run, seq_lens=batch.seq_lens, supervised=batch.num_supervised)
    assert tape.work().flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_rows_of_another_length_cost_what_their_own_trace_says(tiny_base: Path) -> None:
    run = planned(tiny_base, "lora")
    long = trace(run)
    lens, supervised = (12,) * 4, 20
    own = trace(run, seq_lens=lens, supervised=supervised).work()
    scaled = as_content(run, long, Content(sum(lens), supervised, 12)).work()
    assert scaled.attention_flops == pytest.approx(own.attention_flops, rel=0.001)
    assert scaled.product_flops == pytest.approx(own.product_flops, rel=0.02)
    assert scaled.moved_bytes == pytest.approx(own.moved_bytes, rel=0.1)
    assert scaled.kernels == long.work().kernels


@pytest.mark.parametrize("window", [1, 7, 40, 100, 0])
def test_a_window_is_found_in_its_share_of_pairs(window: int) -> None:
    length = 100
    share = attended_pairs([length], window) / attended_pairs([length], 0)
    found = window_of(share, length)
    assert found == pytest.approx(window or length, abs=1.1)
    exact = attended_pairs([length], window) / length
    assert pairs_per_token(length, window or length) == pytest.approx(exact)


# Schedule


def slow_links(bytes_per_s: float) -> Rates:
    """The host takes no time."""
    links = Links(8, bytes_per_s, bytes_per_s, 0.0, 0.0)
    return replace(gpu_rates(A100, dtype="fp32", gpus_per_node=8), links=links, host=Host(0.0))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_a_step_lies_between_perfect_overlap_and_none(tiny_base: Path, strategy: str) -> None:
    run = planned(tiny_base, "full", strategy, WorldShape(1, 8))
    tape = trace(run)
    found = tuple(replace(c, copied_bytes=0) for c in collectives(run))
    for bytes_per_s in (1e6, 1e8, 3e9, 1e14):
        rates = slow_links(bytes_per_s)
        together = step_time(tape, rates=rates, collectives=found, micro_batches=3)
        computed = step_time(tape, rates=rates, micro_batches=3).total_s
        sent = communication_seconds(found, rates, micro_batches=3)
        assert max(computed, sent) <= together.total_s * (1 + 1e-9)
        assert together.total_s <= (computed + sent) * (1 + 1e-9)
        assert together.parts["communication"] + together.hidden_s == pytest.approx(sent)


def test_what_cannot_hide_is_waited_for(tiny_base: Path) -> None:
    run = planned(tiny_base, shape=WorldShape(1, 2))
    tape, rates = trace(run), slow_links(1e7)
    group = Group("world", 2, 2)
    reduce = Collective("all_reduce", 10**7, group, "backward", "last_micro_batch", 0, overlaps=False)
    alone = step_time(tape, rates=rates, micro_batches=4)
    assert step_time(tape, rates=rates, collectives=[reduce], micro_batches=4).total_s == pytest.approx(
        alone.total_s + 1
    )
    update = replace(reduce, of="step", every="step", block=None)
    assert step_time(tape, rates=rates, collectives=[update], micro_batches=4).total_s == pytest.approx(
        alone.total_s + 1
    )


@pytest.mark.parametrize(("every", "times"), [("first_micro_batch", 1), ("last_micro_batch", 1), ("micro_batch", 4)])
def test_copies_are_made_when_something_travels(tiny_base: Path, every: Every, times: int) -> None:
    run = planned(tiny_base, shape=WorldShape(1, 2))
    tape, rates = trace(run), slow_links(1e30)
    gather = Collective("all_gather", 1, Group("world", 2, 2), "forward", every, None, copied_bytes=10**10)
    alone = step_time(tape, rates=rates, micro_batches=4).total_s
    copied = step_time(tape, rates=rates, collectives=[gather], micro_batches=4).total_s
    assert copied - alone == pytest.approx(times * rates.copy_seconds(10**10), rel=1e-3)


def test_links_between_nodes_are_shared() -> None:
    """A ring of 16 GPUs on two nodes, and eight pairs of one GPU on each node, which share the same cards."""
    links = Links(8, 300e9, 100e9, 0.0, 0.0)

    def seconds(kind: Any, group: Group, size: int = 10**9) -> float:
        return links.seconds(Collective(kind, size, group, "backward", "micro_batch", 0))

    assert seconds("all_gather", Group("shard", 8, 8)) == pytest.approx(7 / 8 / 300)
    assert seconds("all_gather", Group("shard", 16, 8)) == pytest.approx(1 / 2 / 100)
    assert seconds("all_reduce", Group("world", 16, 8)) == pytest.approx(1 / 100)
    assert seconds("all_reduce", Group("replica", 2, 1)) == pytest.approx(8 / 100)


def test_a_starved_gpu_waits_for_the_host(tiny_base: Path) -> None:
    run = planned(tiny_base)
    tape, rates = trace(run), gpu_rates(A100, dtype="fp32", gpus_per_node=1)
    tiny = step_time(tape, rates=rates, micro_batches=1)
    assert tiny.total_s == pytest.approx(rates.host.seconds(tape.work()), rel=0.1)
    assert tiny.parts["launch gaps"] > 0.8 * tiny.total_s
    fast_host = step_time(tape, rates=replace(rates, host=Host(0.0)), micro_batches=1)
    assert "launch gaps" not in fast_host.parts
    assert fast_host.total_s == fast_host.busy_s


def larger(tape: Tape, factor: int) -> Tape:
    """As many kernels of so much more work."""

    def grown(segment: Segment) -> Segment:
        work = segment.work
        return replace(
            segment,
            work=replace(work, product_flops=work.product_flops * factor, moved_bytes=work.moved_bytes * factor),
        )

    pieces = {
        name: tuple(map(grown, value)) if name in ("forward", "backward") else grown(value)
        for name, value in vars(tape).items()
        if name not in ("recorded", "saved_bytes")
    }
    return replace(tape, **pieces)


def test_a_busy_gpu_does_not_notice_the_host(tiny_base: Path) -> None:
    """But for what it waits at the start, before the first stretch was asked for."""
    tape, rates = larger(trace(planned(tiny_base)), 10**5), gpu_rates(A100, dtype="fp32", gpus_per_node=1)
    large = step_time(tape, rates=rates, micro_batches=1)
    assert large.parts.get("launch gaps", 0.0) < 0.01 * large.total_s
    units = step_time(tape, rates=rates, micro_batches=1, units=FSDP1)
    assert units.total_s == pytest.approx(large.total_s, rel=0.01)


def test_the_update_waits_for_the_host_once_a_step(tiny_base: Path) -> None:
    tape, rates = trace(planned(tiny_base)), gpu_rates(A100, dtype="fp32", gpus_per_node=1)
    without = step_time(tape, rates=rates, micro_batches=3)
    quick = step_time(tape, rates=rates, micro_batches=3, update_s=2.0, update_host_s=1.0)
    slow = step_time(tape, rates=rates, micro_batches=3, update_s=1.0, update_host_s=2.0)
    assert quick.total_s == pytest.approx(without.total_s + 2)
    assert slow.total_s == pytest.approx(without.total_s + 2)
    assert slow.parts["launch gaps"] == pytest.approx(without.parts["launch gaps"] + 1)


def test_units_cost_the_host_their_hooks(tiny_base: Path) -> None:
    """A step that the host decides takes as much longer as the hooks of all its blocks."""
    tape, rates = trace(planned(tiny_base)), gpu_rates(A100, dtype="fp32", gpus_per_node=1)
    without = step_time(tape, rates=rates, micro_batches=1)
    sharded = step_time(tape, rates=rates, micro_batches=1, units=FSDP2)
    hooks = 2 * FSDP2.open_s + FSDP2.close_s + FSDP2.reduce_s
    expected = len(tape.recorded) * rates.host.slowdown * hooks
    assert sharded.total_s - without.total_s == pytest.approx(expected, rel=0.01)


def test_a_limited_host_is_not_far_enough_ahead(tiny_base: Path) -> None:
    """Units inside a block: while the GPU does long work, an unlimited host prepares what is short; a limited one,
    which waits for the long work to end, does not."""
    plain = trace(planned(tiny_base))
    long, short = Work(product_flops=10**12), Work(kernels=100, operators=100)
    moments = (
        (long, "close"),
        (Work(), "open"),
        (short, "close"),
        (Work(), "open"),
        (short, "close"),
        (Work(), "open"),
    )
    block = replace(plain.forward[0], work=sum((w for w, _ in moments), Work()), stretches=moments)
    tape = replace(plain, forward=(block,) * len(plain.forward))
    rates = gpu_rates(A100, dtype="fp32", gpus_per_node=1)
    limited = step_time(tape, rates=rates, micro_batches=1, units=FSDP1, backward=False)
    free = step_time(tape, rates=rates, micro_batches=1, units=replace(FSDP1, in_flight=10**6), backward=False)
    assert limited.parts["launch gaps"] > free.parts["launch gaps"] + len(tape.recorded) * 100 * 5e-6
    assert limited.busy_s == free.busy_s


# Plan


def plan(run: Run, tape: Tape, gpu: str = "A100-SXM-80GB", network: str | None = None, **options: Any) -> TimePlan:
    between = None if network is None else find_network(network)
    return plan_time(run, tape, data=data_of(run), gpu=find_gpu(gpu), network=between, model_tape=tape, **options)


def test_figures_of_a_plan_agree(tiny_base: Path) -> None:
    run = planned(tiny_base, shape=WorldShape(1, 4), activation_checkpointing={"mode": "none"})
    time = plan(run, trace(run))
    tokens = run.batch.global_batch_size * run.batch.max_seq_len
    assert sum(time.step_parts.values()) == pytest.approx(time.step.value)
    assert time.tokens_per_s.value * time.step.value == pytest.approx(tokens)
    assert time.tokens_per_s_per_gpu * 4 == pytest.approx(time.tokens_per_s.value)
    assert time.phases["train"] == pytest.approx(10 * time.step.value)
    assert sum(time.phases.values()) == pytest.approx(time.total.value)
    for each in (time.step, time.total, time.tokens_per_s):
        assert each.low < each.value < each.high
    assert time.mfu == time.hfu == pytest.approx(time.flops_per_token * time.tokens_per_s_per_gpu / A100.flops["fp32"])


def test_recomputation_costs_time_and_is_no_model_flop(tiny_base: Path) -> None:
    plain = planned(tiny_base, activation_checkpointing={"mode": "none"})
    again = planned(tiny_base, activation_checkpointing={"mode": "full"})
    without = plan(plain, trace(plain))
    tape = trace(again)
    time = plan_time(again, tape, data=data_of(again), gpu=A100)
    assert time.flops_per_token == pytest.approx(without.flops_per_token)
    assert time.hfu > 1.2 * time.mfu
    assert time.step.value > without.step.value


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_more_gpus_are_never_slower_over_free_links(tiny_base: Path, strategy: str) -> None:
    free = Links(1, 1e18, 1e18, 0.0, 0.0)
    tape = trace(planned(tiny_base, "full", strategy))
    seconds = []
    for size in (1, 2, 4, 8):
        run = planned(tiny_base, "full", strategy, WorldShape(1, size))
        rates = replace(gpu_rates(A100, dtype="fp32", gpus_per_node=size), links=free)
        found = tuple(replace(c, copied_bytes=0) for c in collectives(run))
        micro_batches = run.batch.gradient_accumulation_steps
        seconds.append(step_time(tape, rates=rates, collectives=found, micro_batches=micro_batches).total_s)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] / seconds[-1] == pytest.approx(8, rel=0.01)


def test_slower_links_and_networks_make_slower_steps(tiny_base: Path) -> None:
    run = planned(tiny_base, shape=WorldShape(2, 8), precision={"compute": "bf16"})
    tape = trace(run)
    steps = [plan(run, tape, network=name).step.value for name in ("infiniband-ndr-x8", "ethernet-25g", "ethernet-10g")]
    assert steps == sorted(steps)
    with pytest.raises(PlanError, match="network"):
        plan(run, tape)


def test_a_gpu_without_the_dtype_is_refused(tiny_base: Path) -> None:
    run = planned(tiny_base, precision={"compute": "bf16"})
    with pytest.raises(PlanError, match="bf16"):
        plan(run, trace(run), gpu="V100-SXM-32GB")


def test_offloading_costs_time(tiny_base: Path) -> None:
    device, host = (
        planned(tiny_base, sharding={"strategy": "fsdp2", "cpu_offload": offload}) for offload in (False, True)
    )
    tape = trace(device)
    on_device, on_host = plan(device, tape), plan(host, tape)
    assert on_host.step_parts["optimizer"] > on_device.step_parts["optimizer"]
    assert on_host.step.value > on_device.step.value


def test_short_segments_make_attention_cheaper(tiny_base: Path) -> None:
    run = planned(tiny_base)
    tape = trace(run)
    long, short = (
        plan_time(run, tape, data=data_of(run, segment=segment), gpu=A100, model_tape=tape) for segment in (48, 12)
    )
    assert short.step_parts["attention"] < 0.35 * long.step_parts["attention"]
    assert short.step_parts["matrix products"] == long.step_parts["matrix products"]


# Calibration


def measured(run: Run, **changes: Any) -> Calibration:
    entry = Calibration(A100.name, calibration_key(run), 1.25, 1.02, 100, "2026-01-02", {"torch": torch.__version__})
    return replace(entry, **changes)


def test_what_shares_a_calibration(tiny_base: Path) -> None:
    """Other methods, storage and dtypes have other speeds."""
    quantised = ({"type": "qlora", "quantization": {"type": kind}} for kind in ("nf4", "int8"))
    runs = [planned(tiny_base, method) for method in ("full", "lora", *quantised)]
    keys = [calibration_key(run) for run in runs]
    keys.append(calibration_key(replace(runs[0], precision=replace(runs[0].precision, compute="bf16"))))
    assert len(set(keys)) == 5


def test_a_measurement_corrects_the_next_plan(tiny_base: Path, tmp_path: Path) -> None:
    run = planned(tiny_base, "lora", precision={"compute": "bf16"})
    tape = trace(run)
    assert calibration.record(measured(run), folder=tmp_path)
    found = calibration.lookup("NVIDIA A100-SXM-80GB", calibration_key(run), folder=tmp_path)
    assert found == measured(run)
    before, after = plan(run, tape), plan(run, tape, calibration=found)
    assert (before.basis, after.basis) == ("published", "calibrated here")
    assert after.efficiency == pytest.approx(before.efficiency / 1.25)
    assert after.step_parts["matrix products"] == pytest.approx(1.25 * before.step_parts["matrix products"])
    assert after.step.value == pytest.approx(1.25 * before.step.value)  # the host's part as well
    assert after.step.high - after.step.low < before.step.high - before.step.low


def test_measurements_are_kept_by_gpu_and_kind(tiny_base: Path, tmp_path: Path) -> None:
    full, lora = planned(tiny_base), planned(tiny_base, "lora")
    for entry in (measured(full), measured(lora, time_ratio=0.9), measured(full, gpu="L4", time_ratio=2.0)):
        assert calibration.record(entry, folder=tmp_path)
    assert calibration.record(measured(full, time_ratio=1.1), folder=tmp_path), "the last one counts"
    ratios = [
        found and found.time_ratio
        for gpu, run in ((A100.name, full), (A100.name, lora), ("L4", full), ("L4", lora))
        for found in [calibration.lookup(gpu, calibration_key(run), folder=tmp_path)]
    ]
    assert ratios == [1.1, 0.9, 2.0, None]
    assert len(list(tmp_path.iterdir())) == 2, "nothing temporary stays"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"format": 0, "entries": []}', '{"format": 1, "entries": [{"gpu": 3}]}', "\x00"]
)
def test_a_damaged_file_counts_as_absent(tiny_base: Path, tmp_path: Path, damage: str) -> None:
    run = planned(tiny_base)
    calibration.record(measured(run), folder=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert calibration.lookup(A100.name, calibration_key(run), folder=tmp_path) is None
    assert calibration.record(measured(run), folder=tmp_path)
    assert calibration.lookup(A100.name, calibration_key(run), folder=tmp_path) == measured(run)


@pytest.mark.parametrize(
    "change", [{"steps": 2}, {"time_ratio": float("nan")}, {"time_ratio": 1e6}, {"memory_ratio": -1.0}]
)
def test_nonsense_is_not_kept(tiny_base: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    assert not calibration.record(measured(planned(tiny_base), **change), folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_folder_follows_the_environment() -> None:
    assert calibration.calibration_folder({"SFT_DIST_CACHE": "/a"}) == Path("/a/calibration")
    assert calibration.calibration_folder({"XDG_CACHE_HOME": "/b"}) == Path("/b/sft_dist/calibration")
    assert calibration.calibration_folder({}) == Path.home() / ".cache/sft_dist/calibration"
