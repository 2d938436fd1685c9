"""Steps of other stacks in seconds, with the plan's own arithmetic: what one GPU reached says of several."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.peers.inventory import WIDTHS
from benchmarks.peers.predict import Prediction, tape_of_work
from benchmarks.peers.setup import Row, Setup, words
from benchmarks.peers.sharding import Sharded, timeline_of
from sft_dist.hardware.gpus import Gpu
from sft_dist.plan.launches import FOREACH_TENSOR_S, FSDP1, FSDP2, FUSED_TENSOR_S, WHOLE, Units
from sft_dist.plan.rates import Rates, gpu_rates
from sft_dist.plan.schedule import StepTime, step_time
from sft_dist.plan.tape import Tape
from sft_dist.sharding.collectives import Collective, Group, Kind, Pass

GPUS_PER_NODE = 8
# Numbers that AdamW reads and writes for each parameter: one pass an operation with foreach, one in all fused.
FOREACH_ACCESSES, FUSED_ACCESSES = 20, 7
# Times that FSDP reads and writes a gradient to reduce it.
GRADIENT_ACCESSES = 4


@dataclass(frozen=True)
class Timed:
    """A row with a throughput, and what its step is made of."""

    row: Row
    setup: Setup
    prediction: Prediction
    gpu: Gpu
    measured_s: float  # of a micro-batch

    @property
    def like(self) -> tuple[str, ...]:
        """Rows with one efficiency: GPU, method and kernels."""
        setup = self.setup
        kernels = words(self.row, "kernels")
        return (self.gpu.name, setup.method, setup.quant, setup.upcast_rest, setup.stack, kernels)

    @cached_property
    def tape(self) -> Tape:
        return tape_of_work(self.setup)

    @property
    def flops(self) -> int:
        """Of a micro-batch, recomputation included."""
        return self.tape.work().flops

    def seconds(self, efficiency: float) -> float:
        """Of a step of one micro-batch."""
        return self.step(efficiency).total_s

    def step(self, efficiency: float) -> StepTime:
        rates = self._rates(efficiency)
        return step_time(
            self.tape,
            rates=rates,
            collectives=tuple(_collectives(self.setup, self.prediction)),
            micro_batches=1,
            update_s=_update_seconds(self.setup, self.prediction, rates),
            update_host_s=_update_host_seconds(self.setup, self.prediction, rates),
            units=_units(self.setup),
        )

    def efficiency(self) -> float:
        """With which ``seconds`` is what was measured, by bisection: more efficient is never slower."""
        low, high = 0.01, 2.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self.seconds(middle) < self.measured_s else (middle, high)
        return (low + high) / 2

    def _rates(self, efficiency: float) -> Rates:
        dtype: Any = self.setup.autocast or ("bf16" if self.setup.weights == "fp32" else self.setup.weights)
        per_node = min(self.setup.world, GPUS_PER_NODE)
        return gpu_rates(self.gpu, dtype=dtype, gpus_per_node=per_node, efficiency=efficiency)


def _collectives(setup: Setup, prediction: Prediction) -> Iterator[Collective]:
    """Of FSDP: a layer is gathered in forward, in backward again, and by a reentrant checkpoint a third time.

    FSDP1 puts the gradients of a flat parameter's weights together (the backward of ``torch.split``) and divides them
    before they travel: each is a pass over them.
    """
    counted, tape = prediction.recorded.counted, prediction.recorded.tape
    steps = timeline_of(setup, counted, tape, prediction.recorded.hidden_bytes)
    if not isinstance(steps, Sharded):
        return
    group = Group("shard", setup.sharded_by, min(setup.sharded_by, GPUS_PER_NODE))

    def one(kind: Kind, size: int, of: Pass, block: int | None, copied: int = 0) -> Collective:
        return Collective(kind, size, group, of, "micro_batch", block, copied_bytes=copied)

    yield one("all_gather", steps.whole["root"], "forward", None)
    backward_gathers = 2 if setup.checkpointing == "full" and setup.reentrant else 1
    for block in range(counted.layers):
        yield one("all_gather", steps.whole["layer"], "forward", block)
        yield one("all_gather", backward_gathers * steps.whole["layer"], "backward", block)
        if steps.reduced["layer"]:
            size = steps.reduced["layer"]
            yield one("reduce_scatter", size, "backward", block, GRADIENT_ACCESSES * size)


def _update_seconds(setup: Setup, prediction: Prediction, rates: Rates) -> float:
    counted = prediction.recorded.counted
    numel = (counted.total("trained") + counted.total("adapters")) / setup.sharded_by
    accesses = FOREACH_ACCESSES if setup.foreach else FUSED_ACCESSES
    width = WIDTHS[setup.stored if setup.method == "full" else setup.adapters]
    return numel * width * accesses / rates.memory_bytes_per_s


def _units(setup: Setup) -> Units:
    if setup.sharding == "fsdp1":
        return replace(FSDP1, recomputes=setup.checkpointing == "full" and setup.reentrant)
    return FSDP2 if setup.sharding == "fsdp2" else WHOLE


def _update_host_seconds(setup: Setup, prediction: Prediction, rates: Rates) -> float:
    counted = prediction.recorded.counted
    tensor_s = FOREACH_TENSOR_S if setup.foreach else FUSED_TENSOR_S
    return rates.host.slowdown * tensor_s * (counted.layer.tensors * counted.layers + counted.root.tensors)


def throughput(rows: Sequence[Timed]) -> dict[str, Any]:
    """One efficiency for (GPU, method, kernels) from rows of one GPU, and what it says of rows of several.

    Returns:
        Rows of several GPUs, how many have rows of one GPU to go by, and the errors of their tokens/s as shares: by the
        plan's step, and under ``by_flops`` as if a step were its FLOPs at one rate.
    """
    alone = defaultdict(list)
    for timed in rows:
        if timed.setup.world == 1:
            alone[timed.like].append(timed)
    several = [timed for timed in rows if timed.setup.world > 1]
    known = [timed for timed in several if timed.like in alone]
    result: dict[str, Any] = {
        "rows": len(several), "mapped": len(known), "without_rows_of_one_gpu": len(several) - len(known)
    }  # fmt: skip
    if not known:
        return result
    efficiency = {like: float(np.median([t.efficiency() for t in group])) for like, group in alone.items()}
    rate = {like: float(np.median([t.flops / t.measured_s for t in group])) for like, group in alone.items()}
    by_step = [t.measured_s / t.seconds(efficiency[t.like]) - 1 for t in known]
    by_flops = [t.measured_s / (t.flops / rate[t.like]) - 1 for t in known]
    result |= _errors(known, by_step)
    result["by_flops"] = _errors(known, by_flops)
    result["efficiencies"] = {" | ".join(filter(None, like)): round(value, 3) for like, value in efficiency.items()}
    return result


def _errors(rows: Sequence[Timed], error: Sequence[float]) -> dict[str, Any]:
    off = np.abs(error)
    return {
        "median_abs_error": round(float(np.median(off)), 5),
        "p90": round(float(np.quantile(off, 0.9)), 5),
        "worst": round(float(off.max()), 5),
        "worst_row": str(rows[int(off.argmax())].row.get("id", "")),
    }
