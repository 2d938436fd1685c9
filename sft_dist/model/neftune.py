"""Noise on the embeddings while training (NEFTune: Jain et al. 2023, arXiv 2310.05914, algorithm 1).

The noise of a row is drawn by a generator of its own, from a seed that the step and the row decide and no rank: a row
gets the same noise on any number of ranks, in any pack, and when its step is trained again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sft_dist.data.batch import MicroBatch


def add_noise(embeddings: Tensor, batch: MicroBatch, *, alpha: float, rank_in_group: int = 0) -> Tensor:
    """``embeddings`` with uniform noise within alpha / sqrt(L d) on each row of L tokens.

    Args:
        embeddings: [t, d] of the batch's own tokens that are here.
        batch: with its ``row_seeds``.
        rank_in_group: which part of a split batch this is.
    """
    if not batch.row_seeds:  # evaluation, or nothing to train
        return embeddings
    width, first = embeddings.shape[1], 0 if batch.split is None else sum(batch.split[:rank_in_group])
    last, parts, start = first + embeddings.shape[0], [], 0
    for number, length in enumerate(batch.seq_lens):
        begin, end = max(first, start) - start, min(last, start + length) - start
        start += length
        if begin >= end:
            continue
        if number >= len(batch.row_seeds):  # tokens that only fill a split batch
            parts.append(embeddings.new_zeros(end - begin, width, dtype=torch.float32))
            continue
        generator = torch.Generator(embeddings.device).manual_seed(batch.row_seeds[number])
        noise = torch.rand(length, width, generator=generator, device=embeddings.device)
        parts.append(noise[begin:end].mul_(2).sub_(1).mul_(alpha / math.sqrt(length * width)))
    return embeddings + torch.cat(parts).to(embeddings.dtype)
