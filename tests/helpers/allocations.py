"""What a real step allocates on this rank: every storage that an operator makes or a strategy resizes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sft_dist.config.schema import Config
from sft_dist.data.batch import MicroBatch
from sft_dist.model import cpu_shapes
from sft_dist.plan.activations import seq_lens_of
from sft_dist.run import ZERO_STAGES
from sft_dist.sharding.shard_optimizer import local
from sft_dist.sharding.strategy import Strategy
from tests.helpers import cells


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that live, and the most there were since it was entered.

    Attributes:
        peak: beyond those at the beginning; moment: the operator after which.
    """

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._resized: list[Any] = []  # FSDP2's whole parameters are storages without bytes between uses
        self._total = 0
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):
                self._track(thing)
        self._start = self.live()
        self.peak, self.moment = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._track(tensor)
        now = self.live() - self._start
        if now > self.peak:
            self.peak, self.moment = now, str(func)
        return out

    def live(self) -> int:
        return self._total + sum(s.nbytes() for ref in self._resized if (s := ref()) is not None)

    def _track(self, tensor: Tensor) -> None:
        if hasattr(tensor, "_local_tensor"):
            tensor = tensor._local_tensor
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        key = storage._cdata
        if storage.device.type != "cpu" or key in self._references:
            return
        size = storage.nbytes()
        if size == 0:
            self._references[key] = weakref.ref(storage, lambda _: self._references.pop(key, None))
            self._resized.append(weakref.ref(storage))
            return
        self._sizes[key] = size
        self._total += size
        self._references[key] = weakref.ref(storage, lambda _: self._freed(key))

    def _freed(self, key: int) -> None:
        self._references.pop(key, None)
        self._total -= self._sizes.pop(key)


class SavedBytes:
    """Adds up what autograd keeps from forward to backward, parameters aside, each storage once."""

    def __init__(self, model: torch.nn.Module, batch: MicroBatch) -> None:
        self.model, self.total = model, 0
        self.seen = {t.untyped_storage()._cdata for t in vars(batch).values() if isinstance(t, Tensor)}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        own = {p.untyped_storage()._cdata for p in (*self.model.parameters(), *self.model.buffers())}
        if storage._cdata not in self.seen | own:
            self.seen.add(storage._cdata)
            self.total += storage.nbytes()
        return tensor


@dataclass(frozen=True)
class Measured:
    """One rank's bytes.

    Args:
        saved: that autograd keeps for backward in one micro-batch.
        peak: most beyond what is held between steps, in a step of the planned micro-batches; moment: the operator then.
        parameters, optimizer: between steps, with all buffers and with masters that are not the parameters.
        gradients: that wait for the update; 0 where DeepSpeed has them.
    """

    saved: int
    peak: int
    moment: str
    parameters: int
    optimizer: int
    gradients: int


def measure(cfg_yaml: str) -> Measured:
    """The longest micro-batches that the run can have, with everything supervised, by the operators of a GPU's run."""
    with patch.object(cpu_shapes, "multiplies_bf16", lambda: True):
        return _measure(cfg_yaml)


def _measure(cfg_yaml: str) -> Measured:
    run, strategy = cells.start(Config.model_validate(yaml.safe_load(cfg_yaml)))
    strategy.model.token_multiple = strategy.model.head.row_multiple = 1
    lens = seq_lens_of(run)
    batch = longest(lens, run.model.vocab_size)
    try:
        for _ in range(2):  # states and buckets are made by the first steps
            step(strategy, batch, run.batch.gradient_accumulation_steps)
        saved = SavedBytes(strategy.model, batch)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
            step(strategy, batch, 1)
        is_zero = run.strategy in ZERO_STAGES
        with reducing_unseen(), LiveBytes() as live:
            step(strategy, batch, run.batch.gradient_accumulation_steps, update=False)
        states = strategy.optimizer_state_bytes()
        assert states is not None
        masters = sum(m.nbytes for m in strategy.master_weights()) if is_zero else 0
        held = [tensor for _, tensor, _ in strategy.local_parameters()]
        return Measured(
            saved=saved.total,
            peak=live.peak,
            moment=live.moment,
            parameters=sum(t.nbytes for t in (*held, *strategy.model.buffers())),
            optimizer=states + masters,
            gradients=sum(local(p.grad).nbytes for p in strategy.model.parameters() if p.grad is not None),
        )
    finally:
        strategy.close()


@contextmanager
def reducing_unseen() -> Iterator[None]:
    """gloo reduces a copy of what it is given, which its threads let go of when they come to it; NCCL has none."""
    reduce_scatter = DefaultReduceScatter.__call__

    def unseen(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return reduce_scatter(*args, **kwargs)

    with patch.object(DefaultReduceScatter, "__call__", unseen):
        yield


def step(strategy: Strategy, batch: MicroBatch, micro_batches: int, *, update: bool = True) -> None:
    world = dist.get_world_size()
    for number in range(micro_batches):
        strategy.forward_backward(
            batch, supervised_in_step=batch.num_supervised * world * micro_batches,
            is_last_micro_batch=number == micro_batches - 1,
        )  # fmt: skip
    if update:
        strategy.step(1e-3)


def longest(lens: tuple[int, ...], vocab: int) -> MicroBatch:
    tokens = sum(lens)
    bounds = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lens])
    ids = torch.arange(tokens) % vocab
    return MicroBatch(ids[None], positions[None], bounds, torch.arange(tokens), ids.clone(), lens)
