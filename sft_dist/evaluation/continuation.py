"""Rows that get one token a forward pass: with what is known of the tokens before kept, or computed anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft_dist.data.batch import MicroBatch
from sft_dist.data.loader import micro_batch_of
from sft_dist.model.row_cache import RowCache
from sft_dist.sharding.strategy import Strategy


class Continuation(Protocol):
    """Every rank must call the same methods equally often, in the same order."""

    def first(self) -> Tensor:
        """[rows, V] logits of the token after each row."""

    def keep(self, places: Sequence[int], *, room: int) -> None:
        """Drops all rows but these, by their places among those that are left, before ``room`` calls of ``next``."""

    def next(self, tokens: Tensor) -> Tensor:
        """The rows go on with ``tokens`` [rows]; [rows, V] logits of the token after each of them."""


class Cached:
    """Keys and values stay; a pass after the first one computes the newest token of each row.

    Args:
        rows: as ``whole`` makes them, on the strategy's device.
        positions: that a row may have; None: any number. One that has ended and is not dropped yet stays at the last.
    """

    def __init__(self, strategy: Strategy, rows: MicroBatch, positions: int | None) -> None:
        self._strategy, self._rows, self._cache = strategy, rows, RowCache()
        self._last_position = None if positions is None else positions - 1
        # [rows] of the newest token.
        self._positions = torch.tensor(rows.seq_lens, device=rows.input_ids.device) - 1

    def first(self) -> Tensor:
        logits = self._strategy.infer(self._rows, logits=True, cache=self._cache)
        del self._rows
        return logits

    def keep(self, places: Sequence[int], *, room: int) -> None:
        self._cache.keep(places, room=room)
        self._positions = self._positions[list(places)]

    def next(self, tokens: Tensor) -> Tensor:
        self._positions = (self._positions + 1).clamp(max=self._last_position)
        num_rows = tokens.shape[0]
        each = torch.arange(num_rows + 1, device=tokens.device)
        batch = MicroBatch(
            input_ids=tokens[None],
            position_ids=self._positions[None],
            cu_seqlens=each.int(),
            supervised_index=each[:-1],
            labels=tokens,
            seq_lens=(1,) * num_rows,
        )
        return self._strategy.infer(batch, logits=True, cache=self._cache)


class Recomputed:
    """One row, of which every pass computes all tokens. Arguments as for ``Cached``."""

    def __init__(self, strategy: Strategy, rows: MicroBatch, positions: int | None) -> None:
        assert len(rows.seq_lens) == 1
        self._strategy, self._row, self._longest = strategy, rows, positions

    def first(self) -> Tensor:
        return self._strategy.infer(self._row, logits=True)

    def keep(self, places: Sequence[int], *, room: int) -> None:
        assert list(places) == [0], "there is one row"

    def next(self, tokens: Tensor) -> Tensor:
        row, length = self._row, self._row.num_tokens
        if length != self._longest:  # else it has ended
            self._row = replace(
                row,
                input_ids=torch.cat([row.input_ids, tokens[None]], dim=1),
                position_ids=torch.arange(length + 1, device=tokens.device)[None],
                cu_seqlens=torch.arange(2, dtype=torch.int32, device=tokens.device) * (length + 1),
                supervised_index=row.supervised_index + 1,
                seq_lens=(length + 1,),
            )
        return self.first()


def whole(rows: Sequence[Sequence[int]]) -> MicroBatch:
    """The rows of a first pass, of which the token after each row's last one is asked for."""
    lens = [len(row) for row in rows]
    ends: NDArray[np.int64] = np.cumsum(lens) - 1
    ids = np.concatenate([np.asarray(row, np.int64) for row in rows])
    # No label is read where logits are asked for.
    return micro_batch_of(ids, ends, np.zeros(len(rows), np.int64), lens)
