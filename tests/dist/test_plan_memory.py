"""Planned bytes are the bytes of real steps: what autograd keeps, what is held, and the highest moment of all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft_dist.plan import operators, recorder
from sft_dist.plan.activations import trace
from sft_dist.plan.memory import memory_phases, resident_parts
from sft_dist.resolve import resolve
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells, figures
from tests.helpers.allocations import Measured, measure
from tests.helpers.pool import WorldPool
from tests.helpers.tiny_model import build_base

World = Callable[[int], WorldPool]

# The loss and its scale: one scalar is made before or after the moment that is looked at.
SCALARS = 16


@pytest.fixture(autouse=True)
def this_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rounds no request, and whose operators allocate nothing that nobody sees."""
    monkeypatch.setattr(recorder, "ALLOCATION_UNIT", 1)
    monkeypatch.setattr(operators, "INNER", {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers: a first, two alike, and a last."""
    return build_base(tmp_path_factory.mktemp("four-layers"), num_layers=4)


def cell(
    base: Path,
    size: int,
    strategy: str,
    method: str | dict[str, Any],
    micro_batches: int,
    *,
    seq_len: int = 64,
    **sections: Any,
) -> Any:
    sharding: dict[str, Any] = {"strategy": strategy, **sections.pop("sharding", {})}
    if strategy in ("zero2", "zero3"):  # overlapping is for CUDA
        sharding["deepspeed_config"] = {"zero_optimization": {"overlap_comm": False}}
    return cells.config(
        str(base), method, strategy, sharding=sharding, data={"max_seq_len": seq_len},
        train={"global_batch_size": 2 * size * micro_batches, "micro_batch_size": 2}, **sections,
    )  # fmt: skip


def planned_and_real(world: World, size: int, cfg: Any) -> tuple[Run, int, int, Measured]:
    """The run, its planned kept and highest bytes, and the real ones of rank 0."""
    return (*planned(cfg, size), world(size).run(measure, cells.dump(cfg))[0])


def planned(cfg: Any, size: int) -> tuple[Run, int, int]:
    run = resolve(cfg, WorldShape(1, size))
    played = trace(run)
    phases = {phase.name: phase for phase in memory_phases(run, played, None)}
    held = resident_parts(run)
    if run.strategy == "zero2":  # its gradients are gone after a step
        held["gradients"] = 0
    highest = phases["forward_backward"].allocated_bytes - sum(held.values())
    return run, played.kept_bytes, highest


def check_held(run: Run, real: Measured) -> None:
    parts = resident_parts(run)
    named = ("weights", "adapters", "quantization_state", "buffers")
    assert sum(parts[name] for name in named) == real.parameters  # type: ignore[index]
    assert parts["optimizer"] == real.optimizer
    if run.strategy not in ZERO_STAGES:
        assert sum(s.local_bytes for s in _described(run) if s.requires_grad) == real.gradients


def _described(run: Run) -> Any:
    from sft_dist.sharding import registry

    return registry.describe(run, 0).parameters


METHODS, MODES = ("full", "lora", "qlora"), ("none", "full", "selective")

# Every strategy, method and way to recompute in pairs; the rest of the table is for CI or, where only the number of
# micro-batches is another, for `make test-full`.
FEW = {
    ("ddp", "full", "full", 3), ("ddp", "lora", "none", 1), ("ddp", "qlora", "selective", 1),
    ("fsdp2", "full", "none", 3), ("fsdp2", "full", "selective", 1), ("fsdp2", "lora", "full", 3), ("fsdp2", "qlora", "none", 1),
}  # fmt: skip
TABLE = [
    pytest.param(2, "bf16", *row, marks=() if row in FEW else pytest.mark.ci if row[-1] == 1 else pytest.mark.full)
    for row in itertools.product(("ddp", "fsdp2"), METHODS, MODES, (1, 3))
]
OTHER_WORLDS = [
    pytest.param(1, "bf16", "ddp", "full", "full", 3),
    *(
        (size, compute, strategy, method, "full", 1)
        for size, compute in ((1, "bf16"), (2, "fp32"), (4, "bf16"))
        for strategy, method in itertools.product(("ddp", "fsdp2"), METHODS)
    ),
]


@pytest.mark.parametrize(("size", "compute", "strategy", "method", "mode", "micro_batches"), [*TABLE, *OTHER_WORLDS])
def test_the_highest_moment(
    world: World, base: Path, size: int, compute: str, strategy: str, method: str, mode: str, micro_batches: int
) -> None:
    checkpointing = {"mode": mode}
    cfg = cell(
        base,
        size,
        strategy,
        method,
        micro_batches,
        precision={"compute": compute},
        activation_checkpointing=checkpointing,
    )
    run, kept, highest, real = planned_and_real(world, size, cfg)
    assert kept == real.saved
    assert abs(highest - real.peak) <= SCALARS, f"planned {highest}, real {real.peak} in {real.moment}"
    check_held(run, real)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_highest_moment_with_blocks_that_stay_gathered(world: World, base: Path, method: str) -> None:
    """For all three micro-batches of a step, embedding and output layer with them. Of rows as short as these the
    highest moment is in the second one's backward, where all blocks are there and gradients add up."""
    cfg = cell(
        base, 2, "fsdp2", method, 3, seq_len=32, precision={"compute": "bf16"}, activation_checkpointing={"mode": "none"},
        sharding={"reshard_after_forward": False},
    )  # fmt: skip
    run, kept, highest, real = planned_and_real(world, 2, cfg)
    assert kept == real.saved
    assert abs(highest - real.peak) <= SCALARS, f"planned {highest}, real {real.peak} in {real.moment}"
    check_held(run, real)


@pytest.mark.parametrize(
    ("method", "compute", "sharding"),
    [
        pytest.param("full", "bf16", {}, marks=pytest.mark.ci),
        ("full", "fp32", {}),
        pytest.param("lora", "bf16", {}, marks=pytest.mark.ci),
        pytest.param("full", "bf16", {"reshard_after_forward": False}, marks=pytest.mark.ci),
        pytest.param("qlora", "fp32", {}, marks=pytest.mark.ci),
    ],
)
def test_the_highest_moment_with_gradients_that_wait(
    world: World, base: Path, method: str, compute: str, sharding: dict[str, Any]
) -> None:
    """Whole on every process, in fp32, from the first micro-batch to the last, which reduces them."""
    cfg = cell(
        base, 2, "fsdp2", method, 3, seq_len=32, precision={"compute": compute}, activation_checkpointing={"mode": "none"},
        sharding={"reduce_once_a_step": True} | sharding,
    )  # fmt: skip
    run, kept, highest, real = planned_and_real(world, 2, cfg)
    assert kept == real.saved
    assert abs(highest - real.peak) <= SCALARS, f"planned {highest}, real {real.peak} in {real.moment}"
    check_held(run, real)
    whole = 4 * run.model.num_trainable
    every_time = cell(
        base, 2, "fsdp2", method, 3, seq_len=32, precision={"compute": compute}, activation_checkpointing={"mode": "none"},
        sharding=sharding,
    )  # fmt: skip
    assert highest - planned(every_time, 2)[2] > 0.3 * whole


def test_offloaded_inputs_are_not_on_the_device(world: World, base: Path) -> None:
    """On a CPU both copies are host memory: a real step has the one more that the plan leaves out."""
    settings = {"precision": {"compute": "bf16"}, "activation_checkpointing": {"mode": "full", "offload": True}}
    cfg = cell(base, 2, "fsdp2", "lora", 1, **settings)
    run, _, highest, real = planned_and_real(world, 2, cfg)
    tokens, width = 2 * 64, 2 * run.model.hidden_size
    assert 0 < real.peak - highest <= run.model.num_layers * tokens * width


ZERO = [
    pytest.param(
        size, strategy, method, micro_batches, marks=() if few else pytest.mark.ci if some else pytest.mark.full
    )
    for size, strategy, method, micro_batches in itertools.product((1, 2, 4), ZERO_STAGES, METHODS, (1, 3))
    for few in [size == 2 and method != "qlora" and micro_batches == 1]
    for some in [(size, micro_batches) in {(2, 1), (4, 3)}]
]


@pytest.mark.parametrize(("size", "strategy", "method", "micro_batches"), ZERO)
def test_zero_is_bounded(world: World, base: Path, size: int, strategy: str, method: str, micro_batches: int) -> None:
    """DeepSpeed decides while it runs what is gathered and when a gradient is freed: no step takes more than planned."""
    settings = {"precision": {"compute": "bf16"}, "activation_checkpointing": {"mode": "full"}}
    cfg = cell(base, size, strategy, method, micro_batches, **settings)
    run, kept, highest, real = planned_and_real(world, size, cfg)
    assert kept == real.saved
    check_held(run, real)
    figures.lines.append(
        f"{strategy} {method} on {size}, {micro_batches} micro-batches: planned {highest}, real {real.peak}"
    )
    assert real.peak <= highest + SCALARS
