"""The interface between the loop and a strategy, and what DDP and FSDP2 share of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sft_dist.data.batch import MicroBatch
from sft_dist.model.build import TORCH_DTYPES, SftModel
from sft_dist.model.row_cache import RowCache
from sft_dist.model.weights import Part
from sft_dist.run import Run
from sft_dist.runtime.spans import span
from sft_dist.sharding.optim import set_completed_steps, set_lr, states_of
from sft_dist.sharding.shard_optimizer import local
from sft_dist.sharding.spec import HostPart
from sft_dist.sharding.state import StateShard, shard_of


@dataclass(frozen=True)
class ParameterNorms:
    """L2 norms of this rank's part of the gradients of parameters, on their device.

    Args:
        norms: [names].
    """

    names: tuple[str, ...]
    norms: Tensor

    def non_finite(self) -> list[str]:
        """Names of those that are not; reads the device."""
        return [name for name, norm in zip(self.names, self.norms.tolist(), strict=True) if not math.isfinite(norm)]


@dataclass(frozen=True)
class StepResult:
    """
    Args:
        grad_norm: L2 norm of the gradient of the whole model before clipping, a scalar that may still be on the device.
        is_applied: whether parameters and optimizer have taken the step.
        by_parameter: of the gradients before clipping; None where a strategy cannot tell.
    """

    grad_norm: Tensor
    is_applied: bool = True
    by_parameter: ParameterNorms | None = None


class Strategy(ABC):
    """A model spread over the ranks, and its optimizer.

    One forward and backward are one call, because DDP decides in forward whether the coming backward reduces, and only
    the caller knows which micro-batch is the step's last.

    Attributes:
        model: the built model; its parameters keep their names under every strategy.
        optimizer: holds this rank's master weights; built after sharding, or it would hold parameters that are gone.
    """

    model: SftModel
    optimizer: Optimizer

    @abstractmethod
    def forward_backward(self, batch: MicroBatch, *, supervised_in_step: int, is_last_micro_batch: bool) -> Tensor:
        """Accumulates the gradient of (sum of losses) / ``supervised_in_step`` over all ranks.

        Args:
            batch: this rank's, or its part of the one that its group shares.
            supervised_in_step: supervised tokens of the whole step, over all ranks and micro-batches.

        Returns:
            this micro-batch's summed loss, detached.
        """

    @abstractmethod
    def infer(self, batch: MicroBatch, *, logits: bool, cache: RowCache | None = None) -> Tensor:
        """The model in eval mode, without gradients; every rank must call it equally often.

        A batch that is not split is computed whole by each rank, also where ranks share those of training.

        Args:
            logits: return the [N, V] logits at the batch's supervised positions, not their summed loss.
            cache: as for ``SftModel.forward``; on every rank or on none, and filled on all of them or on none.
        """

    def evaluate(self, batch: MicroBatch) -> Tensor:
        """Summed loss without gradients; every rank must call it equally often."""
        return self.infer(batch, logits=False)

    @abstractmethod
    def step(self, lr: float, *, only_finite: bool = False) -> StepResult:
        """Clips, updates the parameters with learning rate ``lr`` and clears the gradients.

        Args:
            only_finite: not if the gradient's norm is not finite; the host waits for it. ZeRO never does, with or
                without.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clears the gradients instead of ``step``: parameters and optimizer are as if there had been no pass."""

    @abstractmethod
    def local_parameters(self) -> Iterator[tuple[str, Tensor, bool]]:
        """(name, what this rank keeps of it between steps, requires_grad) of every parameter, in the model's order."""

    @abstractmethod
    def master_weights(self) -> list[Tensor]:
        """This rank's part of what the optimizer updates."""

    def optimizer_state_bytes(self) -> int | None:
        """What this rank's optimizer keeps beside the master weights; None before a lazy optimizer's first step."""
        states = [v for state in self.base_optimizer().state.values() for k, v in state.items() if k != "step"]
        return sum(tensor.numel() * tensor.element_size() for tensor in map(local, states)) if states else None

    def base_optimizer(self) -> Optimizer:
        """The optimizer that keeps the states."""
        return self.optimizer

    def parts_on_host(self) -> frozenset[HostPart]:
        """What is kept in host memory, even where there is a GPU."""
        return frozenset()

    @abstractmethod
    def state(self) -> dict[str, StateShard]:
        """This rank's part of what a checkpoint holds, by names that are the same under every strategy.

        ``model.NAME`` is a trained parameter's master weight, ``optim.KIND.NAME`` an optimizer state in its dtype. The
        values are those that training reads and writes: to save, copy them; to resume, write into them and call
        ``restored``. No rank gathers anything.
        """

    def release(self) -> None:
        """Lets go of what the last pass has left gathered, as the next step would; every rank must call it."""
        return

    @abstractmethod
    def restored(self, *, completed_steps: int) -> None:
        """Takes over what was written into the values of ``state``; every rank must call it.

        Args:
            completed_steps: optimizer steps behind the state; AdamW corrects its bias by them.
        """

    @abstractmethod
    def full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        """Gathers parameters one at a time, trainable ones in ``master``; all ranks iterate to the end.

        A tensor is valid until the next one is asked for: copy what is to stay.
        """

    def close(self) -> None:
        """Lets go of what was registered outside the model."""
        if self.model.sequence_group is not None:
            dist.destroy_process_group(self.model.sequence_group)


# Squares that are added up in fp32.
NORM_PART = 512


class NativeStrategy(Strategy):
    """What the two strategies of torch share: loss scaling, the exact norm, clipping and the optimizer step."""

    def __init__(self, run: Run, model: SftModel) -> None:
        self.model = model
        self.world_size = run.world.size
        self.max_grad_norm = run.optim.max_grad_norm

    def _forward_backward(self, model: nn.Module, batch: MicroBatch, supervised_in_step: int) -> Tensor:
        """
        Args:
            model: the model, or what is wrapped around it.
        """
        with span("forward"):
            loss_sum: Tensor = model(batch)
        # Both average gradients over ranks; the factor world_size turns the average back into the sum. Ranks that share
        # a sequence count like any others: each has the losses of its own tokens.
        with span("backward"):
            (loss_sum * (self.world_size / supervised_in_step)).backward()
        return loss_sum.detach()

    def step(self, lr: float, *, only_finite: bool = False) -> StepResult:
        named = [(name, local(p.grad)) for name, p in self.model.named_parameters() if p.grad is not None]
        names, gradients = tuple(name for name, _ in named), [gradient for _, gradient in named]
        norms = norms_of(gradients)
        norm, by_parameter = self._global_norm(norms), ParameterNorms(names, norms)
        if only_finite and not math.isfinite(float(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            return StepResult(norm, is_applied=False, by_parameter=by_parameter)
        if self.max_grad_norm is not None:
            # The coefficient stays on the device: reading it would make the host wait.
            coefficient = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(gradients, coefficient)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(norm, by_parameter=by_parameter)

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _global_norm(self, norms: Tensor) -> Tensor:
        """The norm of all gradients, from the ``norms`` [parameters] of this rank's parts."""
        squares = norms.square().sum()
        if self.shard_group is not None:
            dist.all_reduce(squares, group=self.shard_group)
        return squares.sqrt()

    @property
    @abstractmethod
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold a part of each gradient; None where every rank holds the whole."""

    def local_parameters(self) -> Iterator[tuple[str, Tensor, bool]]:
        for name, parameter in self.model.named_parameters():
            yield name, local(parameter), parameter.requires_grad

    def state(self) -> dict[str, StateShard]:
        state: dict[str, StateShard] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                state[f"model.{name}"] = shard_of(parameter.detach())
                for kind, tensor in states_of(self.optimizer, parameter).items():
                    state[f"optim.{kind}.{name}"] = shard_of(tensor)
        return state

    def restored(self, *, completed_steps: int) -> None:
        for parameter in self.trainable():
            set_completed_steps(self.optimizer, parameter, completed_steps)

    def master_weights(self) -> list[Tensor]:
        return [local(p) for group in self.optimizer.param_groups for p in group["params"]]

    def full_parameters(self, *, trainable_only: bool) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trainable_only:
                full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                yield name, full.detach()


def norms_of(gradients: list[Tensor]) -> Tensor:
    """[gradients] L2 norms with fp64 accumulation: torch's fp32 norm on the CPU is off by 2e-3 at 33M elements.

    On the CPU an fp64 norm would copy the gradient to fp64. There the squares of few elements are added up in fp32, and
    those sums in fp64.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float64))
    return torch.stack([_norm_by_parts(gradient.reshape(-1)) for gradient in gradients])


def _norm_by_parts(flat: Tensor) -> Tensor:
    """Of [n], an fp64 scalar."""
    whole = len(flat) // NORM_PART * NORM_PART
    parts = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_PART), dim=1, dtype=torch.float32)
    norm = torch.linalg.vector_norm(parts, dtype=torch.float64)
    if whole == len(flat):
        return norm
    return torch.hypot(norm, torch.linalg.vector_norm(flat[whole:], dtype=torch.float64))


def store_master(model: SftModel, run: Run) -> None:
    """Gives trainable parameters the dtype in which native strategies store them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(TORCH_DTYPES[run.precision.master])


@contextmanager
def whole_parameter(meta: nn.Parameter, device: torch.device) -> Iterator[Part]:
    """The place of a parameter of which every rank holds all elements."""
    parameter = nn.Parameter(torch.empty(meta.shape, dtype=meta.dtype, device=device), meta.requires_grad)
    yield Part(parameter, parameter.detach().view(-1), 0)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()
