"""Which dtype every kind of tensor has, measured while a step runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sft_dist.config.schema import FullMethod
from sft_dist.data.loader import TrainingOrder, collate
from sft_dist.model import cpu_shapes
from sft_dist.model.describe import describe_model
from sft_dist.run import Precision, StrategyName
from sft_dist.sharding.ddp import Ddp, cast_while_running
from sft_dist.sharding.shard_optimizer import local
from sft_dist.sharding.strategy import NativeStrategy
from sft_dist.train.step import train_step
from tests.helpers.cells import CPU, config, start, synthetic_data
from tests.helpers.loaded import load_model

METHODS = pytest.mark.parametrize("method", ["full", "lora", "qlora"])
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "packed_attention", "packed_attention_backward"}


@pytest.fixture(autouse=True)
def instructions_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU. A CPU without them makes the same products in fp32: tests/unit/test_cpu_shapes.py."""
    monkeypatch.setattr(cpu_shapes, "multiplies_bf16", lambda: True)


@pytest.fixture(scope="module", autouse=True)
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Products(TorchDispatchMode):
    """The operands' dtypes of every matrix product and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[str, frozenset[torch.dtype]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            # The log-sum-exp of attention is always fp32: query, key and value come before it.
            tensors = [t for t in args if isinstance(t, Tensor)][:3]
            self.dtypes.append((name, frozenset(t.dtype for t in tensors)))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[frozenset[torch.dtype]]:
        return [dtypes for n, dtypes in self.dtypes if n == name]


# The table


@pytest.mark.parametrize(
    ("compute", "master", "strategy", "frozen", "trainable"),
    [
        ("bf16", "fp32", "ddp", "bf16", "fp32"),
        ("bf16", "fp32", "fsdp2", "bf16", "fp32"),
        ("bf16", "fp32", "zero1", "bf16", "bf16"),
        ("bf16", "fp32", "zero2", "bf16", "bf16"),
        ("bf16", "fp32", "zero3", "bf16", "bf16"),
        ("bf16", "bf16", "ddp", "bf16", "bf16"),
        ("bf16", "bf16", "fsdp2", "bf16", "bf16"),
        ("fp32", "fp32", "ddp", "fp32", "fp32"),
        ("fp32", "fp32", "zero3", "fp32", "fp32"),
    ],
)
def test_the_dtype_of_every_kind(
    compute: Any, master: Any, strategy: StrategyName, frozen: str, trainable: str
) -> None:
    precision = Precision(compute=compute, master=master, reduce="fp32", optimizer_state=master)
    assert precision.stored(trainable=False, strategy=strategy) == frozen
    assert precision.stored(trainable=True, strategy=strategy) == trainable


# What runs


def native(method: str, name: str = "ddp", *, checkpointing: str = "none", **precision: str) -> Any:
    def make(path: Path) -> tuple[Any, NativeStrategy]:
        run, strategy = start(
            config(
                str(path), method, name,
                precision={"compute": "bf16", **precision}, activation_checkpointing={"mode": checkpointing},
            )
        )  # fmt: skip
        assert isinstance(strategy, NativeStrategy)
        return run, strategy

    return make


@METHODS
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_every_product_runs_in_bf16_and_gradients_are_fp32(
    method: str, name: str, checkpointing: str, tiny_base: Path
) -> None:
    """Adapters too: there is no fp32 side path. With checkpointing the recomputed products are counted as well."""
    run, strategy = native(method, name, checkpointing=checkpointing)(tiny_base)
    batch = collate(synthetic_data(rows=2), [0, 1])
    with Products() as products:
        strategy.forward_backward(batch, supervised_in_step=10, is_last_micro_batch=True)
    assert {dtypes for _, dtypes in products.dtypes} == {frozenset([torch.bfloat16])}
    layers = run.model.num_layers
    assert len(products.of("packed_attention")) == (2 * layers if checkpointing == "full" else layers)
    assert len(products.of("packed_attention_backward")) == layers
    for parameter_name, parameter in strategy.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, parameter_name
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.dtype == torch.float32, parameter_name
        else:
            assert parameter.dtype == torch.bfloat16, parameter_name
            assert parameter.grad is None, parameter_name


@METHODS
def test_in_fp32_no_product_is_anything_else(method: str, tiny_base: Path) -> None:
    _, strategy = native(method, compute="fp32")(tiny_base)
    with Products() as products:
        strategy.forward_backward(
            collate(synthetic_data(rows=2), [0, 1]), supervised_in_step=10, is_last_micro_batch=True
        )
    assert {dtypes for _, dtypes in products.dtypes} == {frozenset([torch.float32])}


def test_a_bf16_master_has_bf16_gradients_and_states(tiny_base: Path) -> None:
    run, strategy = native("full", master="bf16")(tiny_base)
    data = synthetic_data()
    step = TrainingOrder(data, run.batch, 0).step(0)
    train_step(strategy, data, run.batch, step, rank=0, device=CPU, lr=1e-3)
    assert {p.dtype for p in strategy.trainable()} == {torch.bfloat16}
    states = [s for state in strategy.optimizer.state.values() for k, s in state.items() if k != "step"]
    assert len(states) == 2 * len(strategy.trainable())
    assert {s.dtype for s in states} == {torch.bfloat16}


def test_optimizer_states_follow_the_fp32_master(tiny_base: Path) -> None:
    run, strategy = native("lora")(tiny_base)
    data = synthetic_data()
    step = TrainingOrder(data, run.batch, 0).step(0)
    train_step(strategy, data, run.batch, step, rank=0, device=CPU, lr=1e-3)
    states = [s for state in strategy.optimizer.state.values() for k, s in state.items() if k != "step"]
    assert {s.dtype for s in states} == {torch.float32}
    assert sum(s.numel() for s in states) == 2 * run.model.num_trainable


@pytest.mark.parametrize("base", ["tiny_base", "tied_base"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_the_cast_model_is_the_bf16_model(base: str, checkpointing: str, request: pytest.FixtureRequest) -> None:
    """Loss and gradients are those of a model stored in bf16, with the gradients of two uses of a weight added in fp32."""
    path = request.getfixturevalue(base)
    _, strategy = native("full", checkpointing=checkpointing)(path)
    stored = load_model(describe_model(str(path), None, FullMethod(), "bf16"), seed=0)
    batch = collate(synthetic_data(rows=3), [0, 1, 2])
    loss = strategy.forward_backward(batch, supervised_in_step=1, is_last_micro_batch=True)
    expected = stored(batch)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    for (name, mine), theirs in zip(strategy.model.named_parameters(), stored.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        if base == "tied_base" and "embed_tokens" in name:
            # Two bf16 gradients added: in bf16 there, in fp32 here.
            torch.testing.assert_close(mine.grad, theirs.grad.float(), rtol=2**-8, atol=1e-6)
            assert not torch.equal(mine.grad, mine.grad.bfloat16().float())
        else:
            assert torch.equal(mine.grad, theirs.grad.float()), name


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_micro_batches_are_accumulated_in_fp32(name: str, tiny_base: Path) -> None:
    data = synthetic_data(rows=4)
    batches = [collate(data, [row]) for row in range(4)]

    def gradients(part: list[Any]) -> list[Tensor]:
        _, strategy = native("lora", name)(tiny_base)
        for number, batch in enumerate(part):
            strategy.forward_backward(batch, supervised_in_step=7, is_last_micro_batch=number == len(part) - 1)
        return [local(p.grad) for p in strategy.trainable() if p.grad is not None]

    together = gradients(batches)
    alone = [gradients([batch]) for batch in batches]
    for whole, *parts in zip(together, *alone, strict=True):
        assert torch.equal(whole, sum(parts[1:], start=parts[0]))


def test_the_master_is_back_when_a_module_has_run(tiny_base: Path) -> None:
    _, strategy = native("full")(tiny_base)
    assert isinstance(strategy, Ddp)
    strategy.evaluate(collate(synthetic_data(rows=1), [0]))
    for name, module in strategy.model.named_modules():
        assert "weight" not in module.__dict__, name


def test_the_master_is_back_when_a_module_has_failed() -> None:
    linear = nn.Linear(2, 2)
    cast_while_running(linear, torch.bfloat16)
    with pytest.raises(RuntimeError):
        linear(torch.ones(3, dtype=torch.bfloat16))
    assert not {"weight", "bias"} & linear.__dict__.keys()
    assert linear(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_small_updates_are_not_lost(tiny_base: Path) -> None:
    """Steps far below a bf16 weight's resolution add up in the fp32 master."""
    run, strategy = native("full")(tiny_base)
    data = synthetic_data()
    order = TrainingOrder(data, run.batch, 0)
    before = [w.clone() for w in strategy.master_weights()]
    train_step(strategy, data, run.batch, order.step(0), rank=0, device=CPU, lr=1e-6)
    moved = [(a != b).float().mean() for a, b in zip(before, strategy.master_weights(), strict=True)]
    assert max(float(m) for m in moved) > 0.9
