"""What an optimizer step is made of, and what one forward pass of it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

IGNORE_INDEX = -100


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of an optimizer step are spread over ranks and micro-batches.

    Args:
        global_batch_size: sequences (packs or rows) of a step.
        micro_batch_size: most sequences of one forward on a rank.
        world_size: data-parallel ranks; where ranks share sequences, groups of such ranks.
        max_seq_len: most tokens of a sequence.
        sequence_parallel: ranks that share the sequences of a micro-batch.
    """

    global_batch_size: int
    micro_batch_size: int
    world_size: int
    max_seq_len: int
    sequence_parallel: int = 1

    def micro_batches(self, sequences: int) -> int:
        """Forward passes of every rank for a step of ``sequences``; a rank that runs short runs an empty one."""
        return math.ceil(math.ceil(sequences / self.world_size) / self.micro_batch_size)

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.micro_batches(self.global_batch_size)

    def steps_per_epoch(self, sequences: int) -> int:
        """Optimizer steps over ``sequences``; the last one may be smaller, none is dropped."""
        return math.ceil(sequences / self.global_batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """Sequences concatenated to one row, with everything the host knows about them.

    No tensor holds a value that the host needs: sizes and counts are plain integers, so that a step neither waits for
    the device nor depends on data when it is traced.

    Where ranks share sequences this is one rank's part: t of the T tokens in a row, with the bounds of all segments.

    Shapes, for T tokens in S segments (rows of the data), t of them here, N of those supervised; without a split t = T:

    Args:
        input_ids: [1, t] int64.
        position_ids: [1, t] int64, restarting at 0 in every segment.
        cu_seqlens: [S + 1] int32, the bounds of the segments among all T tokens.
        supervised_index: [N] int64, positions whose **next** token is supervised.
        labels: [N] int64, those next tokens.
        seq_lens: lengths of the S segments, summing to T.
        split: tokens of each rank that shares the sequences; None: all are here.
        row_seeds: of what is drawn for each row in training, none of what only fills a batch; else empty.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    supervised_index: torch.Tensor
    labels: torch.Tensor
    seq_lens: tuple[int, ...]
    split: tuple[int, ...] | None = None
    row_seeds: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T, on all ranks that share them."""
        return sum(self.seq_lens)

    @property
    def max_seq_len(self) -> int:
        """Tokens in the longest segment."""
        return max(self.seq_lens)

    @property
    def num_supervised(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on ``device``; the copies do not wait when the host side is pinned."""
        if self.input_ids.device == device:
            return self
        moved = {
            f.name: getattr(self, f.name).pin_memory().to(device, non_blocking=True)
            for f in fields(self)
            if f.name not in ("seq_lens", "split", "row_seeds")
        }
        return replace(self, **moved)
