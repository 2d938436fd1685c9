"""Log-probabilities of continuations, with the model where its shards are: on all ranks, under every strategy.

Continuations of one context that differ in their last token alone, such as the letters of a multiple choice, share a
row. Rows form groups by their length alone, longest first, and a group is computed in the same pass whatever rank runs
it: one process and three find the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.data.loader import empty_micro_batch, micro_batch_of
from sft_dist.evaluation.room import depends_on_neighbours
from sft_dist.model.loss import CHUNK_BYTES
from sft_dist.runtime import progress
from sft_dist.sharding.strategy import Strategy

# Bytes of the fp32 logits of a pass, where more than one row could be in it.
PASS_BYTES = 4 * CHUNK_BYTES


@dataclass(frozen=True)
class Span:
    """Token ids of which the last ones are asked for.

    Args:
        context: at least one.
        continuation: at least one.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """
    Args:
        log_likelihood: sum of the log-probabilities of the continuation's tokens.
        is_greedy: whether each of them is the most probable one; None where that was not asked.
    """

    log_likelihood: float
    is_greedy: bool | None


@dataclass(frozen=True)
class _Row:
    """What a forward pass computes for the spans that share it.

    Args:
        inputs: all tokens but the last of each span.
        num_scored: tokens of a continuation.
        spans: their numbers; their last tokens.
    """

    inputs: tuple[int, ...]
    num_scored: int
    spans: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def first(self) -> int:
        """The position that predicts a continuation's first token."""
        return len(self.inputs) - self.num_scored


def log_likelihoods(
    strategy: Strategy,
    spans: Sequence[Span],
    *,
    rows_at_once: int,
    with_greedy: bool,
    rank: int,
    world_size: int,
    device: torch.device,
) -> list[Likelihood]:
    """Of every span, the same on all ranks; every rank must call it with the same arguments.

    No logits leave their rank: what is gathered are two numbers a span.

    Args:
        rows_at_once: most rows of a forward pass; another number may round otherwise.
        with_greedy: False spares the logits of long continuations.
        world_size: ranks that share the rows: all of the process group.

    Raises:
        ConfigError: rotary frequencies of a row would depend on the rows before.
    """
    rows = _rows(spans)
    longest = max((len(row.inputs) for row in rows), default=0)
    alone = depends_on_neighbours(strategy.model, longest, what="requests") is not None
    vocab = strategy.model.head.out_features
    passes = _passes(rows, 1 if alone else rows_at_once, max_scored=PASS_BYTES // (4 * vocab))
    # [spans, 2]: the sum, and how many tokens are not the most probable ones. Each number is of one rank and 0 on the
    # others, so that adding them up rounds nothing.
    found = torch.zeros(len(spans), 2, dtype=torch.float64, device=device)
    for start in range(0, len(passes), world_size):
        progress.tick()
        number = start + rank
        if number >= len(passes):
            strategy.infer(empty_micro_batch().to(device), logits=True)
        else:
            _compute(strategy, passes[number], found, with_greedy=with_greedy, device=device)
    dist.all_reduce(found)
    return [Likelihood(total, misses == 0 if with_greedy else None) for total, misses in found.tolist()]


def _rows(spans: Sequence[Span]) -> list[_Row]:
    """Longest first: what does not fit the memory fails at once."""
    shared: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for number, span in enumerate(spans):
        assert span.context, "a span has a context"
        assert span.continuation, "a span has a continuation"
        key = (*span.context, *span.continuation[:-1]), len(span.continuation)
        shared.setdefault(key, []).append(number)
    rows = [
        _Row(inputs, scored, tuple(numbers), tuple(spans[number].continuation[-1] for number in numbers))
        for (inputs, scored), numbers in shared.items()
    ]
    return sorted(rows, key=lambda row: (-len(row.inputs), row.inputs, row.num_scored))


def _passes(rows: Sequence[_Row], rows_at_once: int, *, max_scored: int) -> list[list[_Row]]:
    passes: list[list[_Row]] = []
    scored = 0
    for row in rows:
        if not passes or len(passes[-1]) == rows_at_once or scored + row.num_scored > max_scored:
            passes.append([])
            scored = 0
        passes[-1].append(row)
        scored += row.num_scored
    return passes


def _compute(
    strategy: Strategy, rows: Sequence[_Row], found: Tensor, *, with_greedy: bool, device: torch.device
) -> None:
    """Adds what a pass over ``rows`` finds to ``found`` [spans, 2]."""
    batch = _micro_batch(rows).to(device)
    vocab = strategy.model.head.out_features
    if not with_greedy and len(rows) == len(rows[0].spans) == 1 and 4 * vocab * batch.num_supervised > PASS_BYTES:
        found[rows[0].spans[0], 0] = -strategy.evaluate(batch)
        return
    logits = strategy.infer(batch, logits=True)
    places, labels, numbers = (torch.from_numpy(each).to(device) for each in _scored(rows))
    at_once = max(1, CHUNK_BYTES // (4 * vocab))
    normalisers = torch.cat([torch.logsumexp(chunk.float(), dim=-1) for chunk in logits.split(at_once)])
    found[:, 0].index_add_(0, numbers, (logits[places, labels].float() - normalisers[places]).double())
    if with_greedy:
        found[:, 1].index_add_(0, numbers, (logits.argmax(-1)[places] != labels).double())


def _micro_batch(rows: Sequence[_Row]) -> MicroBatch:
    """Supervised is what predicts a continuation; its last label is that of the first span."""
    starts = np.cumsum([0, *(len(row.inputs) for row in rows)])
    index = [np.arange(row.first, len(row.inputs)) + start for row, start in zip(rows, starts, strict=False)]
    labels = [[*row.inputs[row.first + 1 :], row.last[0]] for row in rows]
    return micro_batch_of(
        np.concatenate([np.array(row.inputs, np.int64) for row in rows]),
        np.concatenate(index),
        np.concatenate([np.array(each, np.int64) for each in labels]),
        [len(row.inputs) for row in rows],
    )


def _scored(rows: Sequence[_Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[tokens of all spans] each: which of the pass's logits predict it, the token, and the number of its span."""
    places: list[int] = []
    labels: list[int] = []
    numbers: list[int] = []
    before = 0
    for row in rows:
        for number, last in zip(row.spans, row.last, strict=True):
            places += range(before, before + row.num_scored)
            labels += [*row.inputs[row.first + 1 :], last]
            numbers += [number] * row.num_scored
        before += row.num_scored
    return np.array(places, np.int64), np.array(labels, np.int64), np.array(numbers, np.int64)
