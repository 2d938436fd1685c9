"""What a step draws at random is a function of (seed, step, rank), so a resumed run draws what it would have drawn."""

from __future__ import annotations

import numpy as np
import torch
import xxhash


def step_seed(seed: int, step: int, rank: int) -> int:
    """A seed for one rank's dropout in one step; neighbours share nothing (numpy's ``SeedSequence``)."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Sets torch's generators, of every device, for a step.

    There is no generator state to save with a checkpoint: the step's number is all of it.
    """
    torch.manual_seed(step_seed(seed, step, rank))


def rng_digest(seed: int, step: int, rank: int) -> str:
    """Of what torch draws on one rank in a step: another version of it may draw otherwise."""
    generator = torch.Generator().manual_seed(step_seed(seed, step, rank))
    return xxhash.xxh3_64(torch.rand(64, generator=generator).numpy().tobytes()).hexdigest()
