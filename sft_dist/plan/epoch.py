"""From the sequences of an epoch to the steps of a run: the arithmetic that every basis of a data plan shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.loader import TrainingOrder
from sft_dist.data.packing import Packs
from sft_dist.data.prepared import CHOSEN, PreparedData
from sft_dist.data.token_store import ROW
from sft_dist.plan.result import DataPlan, Range
from sft_dist.run import Run

# Of a token in a store: its id and whether it is trained.
BYTES_PER_TOKEN = 5


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data, counted or estimated; see ``DataPlan`` for the fields."""

    rows: float
    tokens: float
    supervised_tokens: float
    sequences: float
    sum_squared_lengths: float

    @classmethod
    def of(cls, lengths: NDArray[np.int64], supervised_tokens: float, packs: Packs, *, scale: float = 1.0) -> Epoch:
        """Of rows that stand for ``scale`` times as many."""
        return cls(
            rows=scale * len(lengths),
            tokens=scale * float(lengths.sum()),
            supervised_tokens=scale * supervised_tokens,
            sequences=scale * len(packs),
            sum_squared_lengths=scale * float(np.square(lengths.astype(np.float64)).sum()),
        )


def data_plan(
    run: Run,
    epoch: Epoch,
    *,
    basis: Literal["prepared", "sampled", "estimated", "assumed"],
    tokens: Range,
    eval_tokens: float,
    cache_bytes: float,
    source: str,
    tokens_of_run: float | None = None,
    lost_share: float = 0.0,
) -> DataPlan:
    """
    Args:
        eval_tokens: of one evaluation; 0: nothing is evaluated.
        lost_share: as of ``DataPlan``.
        tokens_of_run: that all steps train; None: expected, where a run ends within an epoch.
    """
    sequences = max(1, round(epoch.sequences))
    steps, per_epoch = run.num_steps(sequences), run.batch.steps_per_epoch(sequences)
    if tokens_of_run is None:
        whole, rest = divmod(steps, per_epoch)
        tokens_of_run = epoch.tokens * (whole + rest * run.batch.global_batch_size / sequences)
    is_packed = run.data.packing == "best_fit"
    return DataPlan(
        basis=basis,
        rows=round(epoch.rows),
        tokens=tokens,
        supervised_tokens=epoch.supervised_tokens,
        sequences=epoch.sequences,
        sum_squared_lengths=epoch.sum_squared_lengths,
        fill=epoch.tokens / (epoch.sequences * run.data.max_seq_len) if is_packed else 1.0,
        idle_fraction=idle_fraction(run, sequences),
        steps=steps,
        epochs=steps / per_epoch,
        micro_batches_per_step=run.batch.micro_batches(min(run.batch.global_batch_size, sequences)),
        tokens_per_step=tokens_of_run / steps,
        eval_tokens=eval_tokens,
        evaluations=evaluations(run, steps) if eval_tokens else 0,
        cache_bytes=round(cache_bytes),
        source=source,
        lost_share=lost_share,
    )


def dealt(data: DataPlan, run: Run) -> DataPlan:
    """The same epochs and steps on other ranks or in other micro-batches.

    Args:
        run: with the data, seed, global batch and length of the run that ``data`` was planned for.
    """
    sequences = max(1, round(data.sequences))
    return replace(
        data,
        idle_fraction=idle_fraction(run, sequences),
        micro_batches_per_step=run.batch.micro_batches(min(run.batch.global_batch_size, sequences)),
    )


def tokens_of_run(run: Run, data: PreparedData) -> int:
    """That all steps train: whole epochs, and the beginning of the last one in its own order."""
    order = TrainingOrder(data, run.batch, run.seed)
    steps = run.num_steps(data.num_sequences)
    whole, rest = divmod(steps, order.steps_per_epoch)
    begun = sum(order.step(steps - rest + number).num_tokens for number in range(rest))
    return whole * int(data.num_tokens.sum(dtype=np.int64)) + begun


def idle_fraction(run: Run, sequences: int) -> float:
    """Share of all ranks' forward passes of the run that are empty.

    Sequences are dealt round-robin and every rank runs as many passes as the one with most (``loader.micro_batches``).
    """
    batch, steps = run.batch, run.num_steps(sequences)
    per_epoch = batch.steps_per_epoch(sequences)
    last = sequences - (per_epoch - 1) * batch.global_batch_size
    num_last = steps // per_epoch
    sizes = Counter({batch.global_batch_size: steps - num_last})
    sizes[last] += num_last
    passes = busy = 0
    for size, number in sizes.items():
        own, more = divmod(size, batch.world_size)
        passes += number * batch.world_size * batch.micro_batches(size)
        busy += number * more * -(-(own + 1) // batch.micro_batch_size)
        busy += number * (batch.world_size - more) * -(-own // batch.micro_batch_size)
    return 1 - busy / passes


def evaluations(run: Run, steps: int) -> int:
    """How often a run of ``steps`` evaluates: see ``Training``."""
    every = run.eval.every_steps
    due = 1 if every is None else steps // every + (steps % every > 0)
    return due + run.eval.before_training


def set_bytes(rows: float, sequences: float) -> float:
    """On disk, of one chosen and packed set."""
    return rows * (CHOSEN.itemsize + 8) + (sequences + 1) * 8


def store_bytes(rows: float, tokens: float) -> float:
    """On disk, of one source as tokens."""
    return rows * ROW.itemsize + tokens * BYTES_PER_TOKEN
