"""Which sequences each optimizer step trains, and which rank runs which of them when.

Everything is a function of (data, batch plan, seed, step), computed anew on every rank: the position of a run is its
step number, and no world size changes what a step learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from sft_dist.data.batch import BatchPlan, MicroBatch
from sft_dist.data.prepared import PreparedData


@dataclass(frozen=True)
class Step:
    """One optimizer step, known on every rank before its first forward.

    Args:
        sequences: the step's sequence numbers over all ranks.
        supervised_tokens: of all of them, the N that the loss is divided by.
        seed: of what is drawn for its rows, whichever rank has them.
    """

    epoch: int
    sequences: NDArray[np.int64]
    num_tokens: int
    supervised_tokens: int
    seed: int = 0


class TrainingOrder:
    """The sequences of every step: each epoch is a permutation by (seed, epoch), cut into global batches."""

    def __init__(self, data: PreparedData, batch: BatchPlan, seed: int) -> None:
        self.data, self.batch, self.seed = data, batch, seed
        self.steps_per_epoch = batch.steps_per_epoch(data.num_sequences)
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.PCG64([self.seed, epoch])).permutation(self.data.num_sequences)

    def step(self, number: int) -> Step:
        """The step with this 0-based number."""
        epoch, position = divmod(number, self.steps_per_epoch)
        size = self.batch.global_batch_size
        sequences = self._permutation(epoch)[position * size : (position + 1) * size]
        return Step(
            epoch=epoch,
            sequences=sequences,
            num_tokens=int(self.data.num_tokens[sequences].sum()),
            supervised_tokens=int(self.data.num_supervised[sequences].sum()),
            seed=_seed(self.seed, number),
        )


def dealt(values: NDArray[np.int64], batch: BatchPlan) -> NDArray[np.int64]:
    """[passes, micro_batch_size, world_size] of ``values`` [sequences] of a step, by the pass and the rank (or group of
    ranks) that runs each; 0 where nothing is left. See ``micro_batches``."""
    passes = batch.micro_batches(len(values))
    filled = np.zeros(passes * batch.micro_batch_size * batch.world_size, np.int64)
    filled[: len(values)] = values
    return filled.reshape(passes, batch.micro_batch_size, batch.world_size)


def micro_batches(
    data: PreparedData, batch: BatchPlan, sequences: NDArray[np.int64], rank: int, seed: int | None = None
) -> Iterator[tuple[MicroBatch, bool]]:
    """This rank's forward passes over ``sequences``, each with whether it is the last.

    Sequences are dealt round-robin, to groups of ranks where ranks share them. Every rank runs equally many passes; one
    that has nothing left runs an empty one, since a rank that stays away from a collective would hang the others.

    Args:
        seed: of the step, in training; None: nothing is drawn.
    """
    part = Part(rank % batch.sequence_parallel, batch.sequence_parallel)
    passes = passes_of(batch, sequences, rank)
    for number, chosen in enumerate(passes):
        rows = [row for sequence in chosen for row in data.packs[sequence]]
        full = collate(data, rows, part) if rows else empty_micro_batch(part)
        if seed is not None:
            full = replace(full, row_seeds=tuple(_seed(seed, row) for row in rows))
        yield full, number == len(passes) - 1


def _seed(*numbers: int) -> int:
    """A seed of 63 bits; neighbours share nothing."""
    return xxhash.xxh3_64_intdigest(" ".join(map(str, numbers)).encode()) >> 1


def passes_of(batch: BatchPlan, sequences: NDArray[np.int64], rank: int) -> list[NDArray[np.int64]]:
    """Which of the sequences of a step this rank runs, by forward pass."""
    own = sequences[rank // batch.sequence_parallel :: batch.world_size]
    size = batch.micro_batch_size
    return [own[number * size : (number + 1) * size] for number in range(batch.micro_batches(len(sequences)))]


@dataclass(frozen=True)
class Part:
    """Which of ``of`` ranks that share the tokens of a micro-batch: number 0 holds the first of them."""

    number: int = 0
    of: int = 1

    def split(self, tokens: int) -> tuple[int, ...]:
        """Tokens of each rank, as even as can be."""
        least, more = divmod(tokens, self.of)
        return tuple(least + (number < more) for number in range(self.of))


WHOLE = Part()


def collate(data: PreparedData, rows: list[int], part: Part = WHOLE) -> MicroBatch:
    """Concatenates rows, each of which becomes a segment, and keeps one part of their tokens."""
    parts = [data.row(row) for row in rows]
    lengths = [len(ids) for ids, _ in parts]
    starts = np.cumsum([0, *lengths])
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    # A position is trained when the token after it, in the same row, is supervised.
    index = np.concatenate([np.flatnonzero(mask[1:]) + start for (_, mask), start in zip(parts, starts, strict=False)])
    return micro_batch_of(ids, index, ids[index + 1], lengths, part)


def empty_micro_batch(part: Part = WHOLE) -> MicroBatch:
    """One token and no label: loss 0 and zero gradients, through the whole model."""
    nothing = np.zeros(0, np.int64)
    return micro_batch_of(np.zeros(1, np.int64), nothing, nothing, [1], part)


def micro_batch_of(
    ids: NDArray[np.int64],
    index: NDArray[np.int64],
    labels: NDArray[np.int64],
    lengths: list[int],
    part: Part = WHOLE,
) -> MicroBatch:
    """The part of a micro-batch: its tokens, and the labels that they predict, wherever the labels' tokens are.

    Args:
        ids: tokens of the rows that have these ``lengths``, one behind the other.
        index: positions that predict ``labels``, ascending.
    """
    lacking = part.of - len(ids)
    if lacking > 0:
        # Models cannot compute zero tokens. These are a segment of their own and predict nothing.
        ids, lengths = np.append(ids, np.zeros(lacking, np.int64)), [*lengths, lacking]
    split = part.split(len(ids))
    start = sum(split[: part.number])
    tokens = slice(start, start + split[part.number])
    supervised = slice(*np.searchsorted(index, [tokens.start, tokens.stop]))
    positions = np.concatenate([np.arange(n) for n in lengths])
    return MicroBatch(
        input_ids=torch.from_numpy(ids[tokens])[None],
        position_ids=torch.from_numpy(positions[tokens])[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        supervised_index=torch.from_numpy(index[supervised] - start),
        labels=torch.from_numpy(labels[supervised]),
        seq_lens=tuple(lengths),
        split=None if part.of == 1 else split,
    )
