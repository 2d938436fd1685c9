"""A copy of what a rank is to save, so that training may go on while it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sft_dist.checkpoint.shard_file import Piece
from sft_dist.sharding.state import StateShard


class HostCopy:
    """Room in host memory for one copy, which is kept from save to save.

    From a GPU the copy is made by the device, between the steps that are queued there; the host does not wait for it.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def take(self, state: Mapping[str, StateShard]) -> tuple[dict[str, Piece], Callable[[], None]]:
        """Copies what this rank writes of a state; the last copy is overwritten.

        Returns:
            the pieces that are not empty, and a function that returns when their values are there.
        """
        pieces = {}
        for name, shard in state.items():
            mine = shard.share()
            if mine.values.numel():
                pieces[name] = Piece(
                    mine.first, self._room_for(name, mine.values).copy_(mine.values, non_blocking=True)
                )
        if not torch.cuda.is_available():
            return pieces, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return pieces, copied.synchronize

    def _room_for(self, name: str, values: Tensor) -> Tensor:
        if name not in self._room:
            # The device copies into pinned memory only while the host goes on.
            self._room[name] = torch.empty(
                values.shape, dtype=values.dtype, pin_memory=torch.cuda.is_available() and values.is_cuda
            )
        return self._room[name]


def in_place(state: Mapping[str, StateShard]) -> dict[str, Piece]:
    """What this rank writes of a state, as it is: without a copy where it is in host memory."""
    shares = {name: shard.share() for name, shard in state.items()}
    return {name: Piece(mine.first, mine.values.cpu()) for name, mine in shares.items() if mine.values.numel()}
