"""Perplexity of texts that are longer than what the model sees at once, by a window that slides over them.

As in Hugging Face's "Perplexity of fixed-length models": a window of up to L tokens moves on by S, and those of its
tokens count that no window before has scored, with what is left of the window as their context. Every token of a text
but the first counts once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from sft_dist.data.batch import MicroBatch
from sft_dist.data.loader import empty_micro_batch, micro_batch_of
from sft_dist.errors import ConfigError
from sft_dist.evaluation.room import depends_on_neighbours, num_positions
from sft_dist.runtime import progress
from sft_dist.sharding.strategy import Strategy

Row = NDArray[np.int32] | NDArray[np.int64]


@dataclass(frozen=True)
class WindowedLoss:
    """The same on all ranks.

    Args:
        sums: [rows] summed losses.
        tokens: [rows] tokens that they are of.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean over all tokens; NaN where there are none."""
        count = int(self.tokens.sum())
        return math.fsum(self.sums) / count if count else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite when that is beyond a float."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@dataclass(frozen=True)
class Window:
    """Tokens ``begin`` to ``end`` of a row, of which those from ``scored`` on count."""

    begin: int
    scored: int
    end: int


def windows_of(num_tokens: int, *, length: int, stride: int) -> list[Window]:
    """The windows over a row; none over a row in which no token is predicted."""
    begins = [number * stride for number in range(_num_windows(num_tokens, length, stride))]
    ends = [min(begin + length, num_tokens) for begin in begins]
    return [Window(*each) for each in zip(begins, [1, *ends], ends, strict=False)]


def windowed_loss(
    strategy: Strategy,
    rows: Sequence[Row],
    *,
    length: int,
    stride: int,
    windows_at_once: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> WindowedLoss:
    """Losses of all tokens of ``rows`` but the first of each; every rank must call it with the same arguments.

    Args:
        rows: token ids; a rank looks only at those that it scores, and at the lengths of all.
        length: most tokens that the model sees at once.
        stride: tokens by which the window moves, less than ``length``.
        windows_at_once: most windows of a forward pass, which are of one row.
        world_size: ranks that share the windows: all of the process group.

    Raises:
        ConfigError: no such windows, or the model cannot see them.
    """
    _check(strategy, length, stride)
    lens = np.array([len(row) for row in rows], np.int64)
    alone = depends_on_neighbours(strategy.model, min(length, int(lens.max(initial=0))), what="windows") is not None
    at_once = 1 if alone else windows_at_once
    passes = np.array([-(-_num_windows(int(n), length, stride) // at_once) for n in lens], np.int64)
    of_row = np.repeat(np.arange(len(rows)), passes)
    first_pass = np.cumsum(passes) - passes
    # What a pass computes depends neither on the number of ranks nor on which of them runs it. Each sum is of one rank
    # and 0 on the others, so that adding them up rounds nothing.
    sums = torch.zeros(len(of_row), dtype=torch.float64, device=device)
    for start in range(0, len(of_row), world_size):
        progress.tick()
        number = start + rank
        if number >= len(of_row):
            strategy.evaluate(empty_micro_batch().to(device))
            continue
        row = int(of_row[number])
        windows = windows_of(int(lens[row]), length=length, stride=stride)
        first = (number - int(first_pass[row])) * at_once
        sums[number] = strategy.evaluate(_micro_batch(rows[row], windows[first : first + at_once]).to(device))
    dist.all_reduce(sums)
    by_row = np.bincount(of_row, weights=sums.cpu().numpy(), minlength=len(rows)).astype(np.float64)
    return WindowedLoss(by_row, np.maximum(lens - 1, 0))


def _check(strategy: Strategy, length: int, stride: int) -> None:
    if not 0 < stride < length:
        raise ConfigError(
            f"a window of {length} tokens that moves by {stride}: some token would have none before it, or none would "
            "move",
            fix=f"let it move by 1 to {max(1, length - 1)} tokens",
        )
    positions = num_positions(strategy.model)
    if positions is not None and length > positions:
        raise ConfigError(
            f"a window of {length:,} tokens, and the model has {positions:,} positions",
            fix=f"take windows of at most {positions:,} tokens",
        )


def _num_windows(num_tokens: int, length: int, stride: int) -> int:
    return 0 if num_tokens < 2 else 1 + max(0, -(-(num_tokens - length) // stride))


def _micro_batch(row: Row, windows: Sequence[Window]) -> MicroBatch:
    lens = np.array([window.end - window.begin for window in windows], np.int64)
    starts = np.cumsum(lens) - lens
    ids = np.concatenate([row[window.begin : window.end] for window in windows]).astype(np.int64)
    labels = np.concatenate([row[window.scored : window.end] for window in windows]).astype(np.int64)
    return micro_batch_of(ids, np.concatenate(list(_predicting(windows, starts))), labels, lens.tolist())


def _predicting(windows: Sequence[Window], starts: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The positions before those that are scored."""
    for window, start in zip(windows, starts, strict=True):
        yield np.arange(window.scored, window.end) - 1 - window.begin + start
