"""One optimizer step, and one pass over the evaluation set."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import Step, micro_batches
from sft_dist.data.prepared import PreparedData
from sft_dist.runtime import progress
from sft_dist.runtime.spans import span
from sft_dist.sharding.strategy import ParameterNorms, StepResult, Strategy

T = TypeVar("T")


class Timed(Iterator[T]):
    """An iterator that adds up the time spent waiting for its items."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.waited_s = 0.0

    def __next__(self) -> T:
        started = time.perf_counter()
        try:
            with progress.doing("data"), span("data"):
                return next(self._items)
        finally:
            self.waited_s += time.perf_counter() - started


@dataclass(frozen=True)
class StepOutcome:
    """Scalars that may still be on the device; reading them waits for the step.

    Args:
        loss: mean over the step's supervised tokens, over all ranks.
        grad_norm: of that mean's gradient, before clipping; NaN where the loss was not admitted.
        data_wait_s: seconds this rank waited for its micro-batches.
        is_admitted: whether the loss was; else the gradients were cleared unseen.
        is_applied: whether the update was made.
        loss_sums: of each of this rank's micro-batches.
        by_parameter: see ``StepResult``.
    """

    loss: Tensor
    grad_norm: Tensor
    data_wait_s: float
    is_admitted: bool = True
    is_applied: bool = True
    loss_sums: tuple[Tensor, ...] = ()
    by_parameter: ParameterNorms | None = None


@dataclass(frozen=True)
class EvalOutcome:
    """Mean losses over supervised tokens.

    Args:
        loss: of all.
        by_source: of each source that has any.
    """

    loss: float
    by_source: dict[str, float]

    @property
    def metrics(self) -> dict[str, float]:
        """By their names in ``metrics.jsonl``."""
        by_source = {f"eval_loss/{name}": loss for name, loss in self.by_source.items()}
        of_all = {"eval_loss": self.loss, "eval_perplexity": self.perplexity}
        return of_all | (by_source if len(by_source) > 1 else {})

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluated_metrics(data: PreparedData) -> list[str]:
    """The names of what an evaluation on these rows measures."""
    counts = np.bincount(data.sequence_sources, weights=data.num_supervised, minlength=len(data.sources))
    by_source = {name: 0.0 for name, count in zip(data.sources, counts, strict=True) if count}
    return list(EvalOutcome(0.0, by_source).metrics)


def train_step(
    strategy: Strategy,
    data: PreparedData,
    plan: BatchPlan,
    step: Step,
    *,
    rank: int,
    device: torch.device,
    lr: float,
    admits: Callable[[float], bool] | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> StepOutcome:
    """Forward and backward over this rank's share of the step, then the update. No value is read from the device.

    Args:
        admits: asked with the step's loss whether to make the update, and must answer alike on every rank; then the
            host waits for the loss and for the norm, without a finite one of which there is no update either.
        meanwhile: called when the ranks have met over the loss and the update is still to be made: what it begins costs
            no wait of one rank for another that the step does not have anyway.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    loss_sums = []
    batches = Timed(micro_batches(data, plan, step.sequences, rank, step.seed))
    for batch, is_last in batches:
        loss_sums.append(
            strategy.forward_backward(
                batch.to(device), supervised_in_step=step.supervised_tokens, is_last_micro_batch=is_last
            )
        )
        loss_sum += loss_sums[-1]
    with span("loss of all ranks"):
        dist.all_reduce(loss_sum)
    if meanwhile is not None:
        meanwhile()
    loss = loss_sum / step.supervised_tokens
    is_admitted = admits is None or admits(float(loss))
    if is_admitted:
        with span("update"):
            result = strategy.step(lr, only_finite=admits is not None)
    else:
        strategy.discard()
        result = StepResult(torch.tensor(math.nan), is_applied=False)
    return StepOutcome(
        loss=loss, grad_norm=result.grad_norm, data_wait_s=batches.waited_s, is_admitted=is_admitted,
        is_applied=result.is_applied, loss_sums=tuple(loss_sums), by_parameter=result.by_parameter,
    )  # fmt: skip


def evaluate(
    strategy: Strategy, data: PreparedData, plan: BatchPlan, *, rank: int, device: torch.device
) -> EvalOutcome:
    """Mean loss over all supervised tokens of ``data``, whose sequences are of one source each; the same on any number
    of ranks."""
    loss_sums = torch.zeros(len(data.sources), dtype=torch.float64, device=device)
    tokens = np.zeros(len(data.sources), np.int64)
    for source in np.unique(data.sequence_sources):
        sequences = np.flatnonzero(data.sequence_sources == source)
        tokens[source] = data.num_supervised[sequences].sum()
        for batch, _ in micro_batches(data, plan, sequences, rank):
            loss_sums[source] += strategy.evaluate(batch.to(device))
            progress.tick()
    dist.all_reduce(loss_sums)
    sums = loss_sums.tolist()
    return EvalOutcome(
        loss=sum(sums) / int(tokens.sum()),
        by_source={name: sums[i] / int(tokens[i]) for i, name in enumerate(data.sources) if tokens[i]},
    )
