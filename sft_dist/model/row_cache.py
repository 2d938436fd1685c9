"""Keys and values of rows that are being continued, so that a forward pass reads one new token of each.

Attention itself writes and reads them, after rotary angles and virtual tokens have had their part: whatever model
attends through ``ATTENTION_NAME`` has the cache, and none needs Transformers' own, which wants rows of one length.

Rows are parts of one buffer a layer, each with the room of its next tokens behind it: nothing is padded to the longest
row, and a new token moves no other one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class RowCache:
    """One pass over whole rows fills it; ``keep`` then makes room, and each further pass has a token of every row.

    An object, not tensors, for the reason that ``Prefix`` gives.

    Attributes:
        lens: tokens of each row that are in it, virtual ones among them; none before the first pass.
        starts: where each row begins in the buffers of the layers.
        is_first_pass: the pass under way is over whole rows.
        bounds: [rows + 1] int32, the same as ``starts`` on the device, and the end.
        used: [rows] int32, the same as ``lens`` on the device.
        query_bounds: [rows + 1] int32, of the new tokens.
    """

    def __init__(self) -> None:
        self.lens: tuple[int, ...] = ()
        self.starts: tuple[int, ...] = ()
        self.is_first_pass = False
        self.bounds = self.used = self.query_bounds = self._new = torch.empty(0, dtype=torch.int32)
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._room = 0

    @property
    def is_filled(self) -> bool:
        return bool(self.lens)

    def begin_pass(self, seq_lens: Sequence[int]) -> None:
        """A pass begins over whole rows of these lengths or, from the second one on, over a new token of each row."""
        self.is_first_pass = not self.is_filled
        if self.is_first_pass:
            self.lens = tuple(seq_lens)
            self.starts = _starts(self.lens)
            return
        assert len(seq_lens) == sum(seq_lens) == len(self.lens), "one token of every row"
        assert self._room > 0, "keep() makes room"
        self._room -= 1
        self.lens = tuple(n + 1 for n in self.lens)
        # The host sends nothing: it would wait.
        self._new = (self.bounds[:-1] + self.used).long()
        self.used = self.used + 1

    def fill(self, layer: nn.Module, key: Tensor, value: Tensor) -> None:
        """Takes what a layer has computed for whole rows, [T, kv_heads, d], concatenated."""
        # A view of a fused projection would keep all of that alive.
        self._layers[layer] = key.contiguous(), value.contiguous()

    def append(self, layer: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' keys and values [rows, kv_heads, d]; the layer's buffers, with them in their places."""
        keys, values = self._layers[layer]
        return keys.index_copy_(0, self._new, key), values.index_copy_(0, self._new, value)

    def keep(self, rows: Sequence[int], *, room: int) -> None:
        """Drops all rows but these, whose order becomes the rows', and makes room for ``room`` more tokens of each."""
        old_starts, self.lens = [self.starts[row] for row in rows], tuple(self.lens[row] for row in rows)
        self.starts = _starts([n + room for n in self.lens])
        self._room = room
        size = sum(self.lens) + room * len(rows)
        device = next(iter(self._layers.values()))[0].device
        here, there = (_positions(starts, self.lens).to(device) for starts in (old_starts, self.starts))
        for layer, (key, value) in self._layers.items():
            # One after the other: beside the cache there is never more than one layer of the new one.
            self._layers[layer] = _moved(key, here, there, size), _moved(value, here, there, size)
        self.bounds = torch.tensor([*self.starts, size], dtype=torch.int32, device=device)
        self.used = torch.tensor(self.lens, dtype=torch.int32, device=device)
        self.query_bounds = torch.arange(len(rows) + 1, dtype=torch.int32, device=device)


def _starts(lens: Sequence[int]) -> tuple[int, ...]:
    return tuple(np.cumsum([0, *lens])[:-1].tolist())


def _positions(starts: Sequence[int], lens: Sequence[int]) -> Tensor:
    """[sum of lens] where the tokens of rows are that begin at ``starts``."""
    return torch.from_numpy(np.concatenate([start + np.arange(n) for start, n in zip(starts, lens, strict=True)]))


def _moved(tensor: Tensor, here: Tensor, there: Tensor, size: int) -> Tensor:
    """[size, ...] with the elements ``here`` of ``tensor`` at ``there``; the rest is never read."""
    return tensor.new_empty(size, *tensor.shape[1:]).index_copy_(0, there, tensor.index_select(0, here))
