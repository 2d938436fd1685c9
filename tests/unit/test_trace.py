"""The step on tensors without values, and the step without the host waiting for the device.

What a CPU can see of the second: every operator whose result depends on a tensor's values, and every call that hands
values to Python. What it cannot see: copies between host and device, which do not exist here. Those from pageable
memory wait too; a micro-batch moves in ``MicroBatch.to`` alone, from pinned memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from sft_dist.config.schema import Config
from sft_dist.data.loader import TrainingOrder, collate, empty_micro_batch
from sft_dist.model.build import TORCH_DTYPES, SftModel, build_meta_model
from sft_dist.model.loss import LossHead
from sft_dist.plan import activations
from sft_dist.plan.activations import trace
from sft_dist.plan.cache import _plain, cached_describe
from sft_dist.resolve import resolve
from sft_dist.run import Run
from sft_dist.runtime.world import WorldShape
from sft_dist.sharding.activation_checkpointing import apply_activation_checkpointing
from sft_dist.sharding.ddp import cast_while_running
from sft_dist.sharding.strategy import store_master
from sft_dist.train.step import StepOutcome, train_step
from tests.helpers.cells import CPU, config, start, synthetic_data

METHODS = pytest.mark.parametrize("method", ["full", "lora", "qlora", "prompt", "p_tuning lstm", "prefix projection"])


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Without values


def fake_model(run: Run) -> SftModel:
    """The meta model with fake CPU tensors in the place of its parameters and buffers; call under FakeTensorMode."""
    model = build_meta_model(run.model.path, run.model.revision, run.model.method, run.model.compute)
    fakes: dict[int, nn.Parameter] = {}  # a tied parameter stays one

    def fake(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in fakes:
            tensor = torch.empty(parameter.shape, dtype=parameter.dtype)
            fakes[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return fakes[id(parameter)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model.train()


@METHODS
@pytest.mark.parametrize(
    ("checkpointing", "compute", "base"),
    [("none", "fp32", "tiny_base"), ("full", "fp32", "tiny_base"), ("full", "bf16", "tied_base")],
)
def test_a_step_runs_on_fake_tensors(
    method: str, checkpointing: str, compute: str, base: str, request: pytest.FixtureRequest
) -> None:
    path = str(request.getfixturevalue(base))
    run = resolve(
        config(path, method, activation_checkpointing={"mode": checkpointing}, precision={"compute": compute}),
        WorldShape(),
    )
    data = synthetic_data(rows=3)
    with FakeTensorMode():
        model = fake_model(run)
        store_master(model, run)
        if compute != run.precision.master:
            cast_while_running(model, TORCH_DTYPES[run.precision.compute])
        apply_activation_checkpointing(model, run.activation_checkpointing)
        loss = model(collate(data, [0, 1, 2]))
        (loss * 0.1).backward()
    assert isinstance(loss, FakeTensor)
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {p.name for p in run.model.trainable}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (parameter.grad.shape, parameter.grad.dtype) == (parameter.shape, torch.float32), name


def test_an_empty_micro_batch_runs_on_fake_tensors(tiny_base: Path) -> None:
    run = resolve(config(str(tiny_base), "qlora"), WorldShape())
    with FakeTensorMode():
        model = fake_model(run)
        model(empty_micro_batch()).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@METHODS
def test_the_first_plan_of_a_model_has_the_trace_of_the_next(
    method: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first takes the model that was built to be described, the next one is described by a file and builds its own."""
    monkeypatch.setenv("SFT_DIST_CACHE", str(tmp_path))
    runs = [resolve(config(str(tiny_base), method), WorldShape(), describe=cached_describe) for _ in range(2)]
    kept = [spec for spec, _, _ in activations._built]
    assert any(spec is runs[0].model for spec in kept)
    assert not any(spec is runs[1].model for spec in kept)
    # The first LSTM that a process traces, of whichever model, adds gradients up with four kernels more than all others.
    trace(runs[1])
    first, second = (_plain(trace(run)) for run in runs)
    assert first == second


@pytest.mark.parametrize(("method", "dropout"), [("full", 0.0), ("lora", 0.0), ("qlora", 0.1)])
def test_what_a_step_keeps_is_what_was_planned(method: str, dropout: float, tmp_path: Path) -> None:
    """Two blocks of Llama-3 8B on 256 tokens in bf16: every storage that forward keeps, parameters left out."""
    LlamaConfig(
        vocab_size=64, hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8,
    ).save_pretrained(tmp_path)  # fmt: skip
    adapter = {} if method == "full" else {"r": 16, "dropout": dropout}
    cfg = config(
        str(tmp_path), "full", "fsdp2", precision={"compute": "bf16"}, activation_checkpointing={"mode": "none"},
        data={"max_seq_len": 256}, train={"micro_batch_size": 1},
    ).model_dump(mode="json")  # fmt: skip
    run = resolve(Config.model_validate({**cfg, "method": {"type": method, **adapter}}), WorldShape())
    data = synthetic_data(rows=16, max_len=60, capacity=256, vocab=64)
    pack = data.packs[int(np.argmax(data.num_tokens))].tolist()
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        model = fake_model(run)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        batch = collate(data, pack)
        own |= {t.untyped_storage()._cdata for t in vars(batch).values() if isinstance(t, Tensor)}
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model(batch)
    size = sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in own)
    tape = trace(run, seq_lens=batch.seq_lens, supervised=len(batch.labels))
    assert tape.kept_bytes == size


def test_a_trace_leaves_nothing_fake_behind(tiny_base: Path, group_of_one: None) -> None:
    """A plan and a training may share a process, in either order."""
    run = resolve(config(str(tiny_base), "qlora"), WorldShape())
    data = synthetic_data(rows=3)
    losses = []
    for _ in range(2):
        with FakeTensorMode():
            fake_model(run)(collate(data, [0, 1, 2])).backward()
        _, strategy = start(config(str(tiny_base), "qlora"))
        losses.append(strategy.evaluate(collate(data, [0, 1, 2])))
    assert not any(isinstance(loss, FakeTensor) for loss in losses)
    assert torch.equal(losses[0], losses[1])


# Without waiting


class HostWaits(AssertionError):
    """The step did something for which the host would wait on a GPU."""


WAITING_OPERATORS = {
    "_local_scalar_dense", "nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "_unique", "_unique2",
    "unique_consecutive", "equal", "is_nonzero", "repeat_interleave.Tensor", "bincount", "allclose", "_assert_async",
}  # fmt: skip

# On the CPU these read memory without an operator.
WAITING_METHODS = {
    "item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__",
    "__contains__",
}  # fmt: skip


class _WaitingOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        overload, packet = func.name().split("::")[-1], func.overloadpacket.__name__
        if packet in WAITING_OPERATORS or overload in WAITING_OPERATORS:
            raise HostWaits(func.name())
        if packet in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        ):
            raise HostWaits(f"{func.name()} with a mask")
        return func(*args, **(kwargs or {}))


class _WaitingMethods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS:
            raise HostWaits(func.__name__)
        return func(*args, **(kwargs or {}))


def watched(step: Callable[[], Any]) -> Any:
    with _WaitingMethods(), _WaitingOperators():
        return step()


@METHODS
@pytest.mark.parametrize("strategy_name", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("compute", "checkpointing"), [("fp32", "none"), ("bf16", "full")])
def test_the_host_never_waits_in_a_step(
    method: str, strategy_name: str, compute: str, checkpointing: str, tiny_base: Path, group_of_one: None
) -> None:
    """From the rows on disk to the outcome: batches, forward, backward, clipping, update."""
    cfg = config(
        str(tiny_base), method, strategy_name,
        precision={"compute": compute}, activation_checkpointing={"mode": checkpointing},
    )  # fmt: skip
    run, strategy = start(cfg)
    data = synthetic_data()
    order = TrainingOrder(data, run.batch, run.seed)

    def one(number: int) -> StepOutcome:
        return train_step(strategy, data, run.batch, order.step(number), rank=0, device=CPU, lr=1e-3)

    one(0)  # the first step makes tables and optimizer states
    before = [w.clone() for w in strategy.master_weights()]
    outcome = watched(lambda: one(1))
    assert run.batch.gradient_accumulation_steps > 1
    assert np.isfinite([float(outcome.loss), float(outcome.grad_norm)]).all()
    assert any(not torch.equal(a, b) for a, b in zip(before, strategy.master_weights(), strict=True))


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(), lambda t: float(t[0]), lambda t: int(t[0]), lambda t: bool(t[0] > 0),
        lambda t: t.tolist(), lambda t: t.numpy(), lambda t: t.cpu(), lambda t: t[t > 0], lambda t: t.nonzero(),
        lambda t: t.masked_select(t > 0), lambda t: t.unique(), lambda t: torch.equal(t, t), lambda t: torch.where(t > 0),
        lambda t: t.masked_fill_(t > 0, 0)[t > 0], lambda t: t.repeat_interleave(t.long()), lambda t: max(t),
        lambda t: [0, 1, 2][t.long()[0]], lambda t: t.index_put((t > 0,), t[:1]), lambda t: np.asarray(t),
        lambda t: 1.0 in t,
    ],
)  # fmt: skip
def test_waiting_is_caught(wait: Callable[[Tensor], Any]) -> None:
    tensor = torch.arange(3.0)
    with pytest.raises(HostWaits):
        watched(lambda: wait(tensor))


def test_what_does_not_wait_is_let_through() -> None:
    def step() -> Tensor:
        tensor = torch.arange(6.0)
        tensor = tensor.masked_fill(tensor > 3, 0.0).index_select(0, torch.tensor([0, 2]))
        return torch.where(tensor > 0, tensor, tensor[torch.tensor([1, 0])]).clamp(max=1.0)

    assert watched(step).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_waiting_inside_a_real_step_is_caught(
    place: str, tiny_base: Path, group_of_one: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, strategy = start(config(str(tiny_base), "full", "ddp"))
    data = synthetic_data()
    step = TrainingOrder(data, run.batch, run.seed).step(0)
    original = LossHead.forward

    def reads_a_value(self: LossHead, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        if place == "forward":
            hidden.sum().item()
        else:
            hidden.register_hook(lambda gradient: gradient * bool(gradient.sum() > 0))
        return original(self, hidden, labels)

    monkeypatch.setattr(LossHead, "forward", reads_a_value)
    with pytest.raises(HostWaits):
        watched(lambda: train_step(strategy, data, run.batch, step, rank=0, device=CPU, lr=1e-3))
