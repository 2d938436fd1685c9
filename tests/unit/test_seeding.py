from __future__ import annotations

import itertools

import torch

from sft_dist.runtime.seeding import seed_step, step_seed


def test_each_rank_and_step_draws_its_own_and_the_same_again() -> None:
    def drawn(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return float(torch.rand((), dtype=torch.float64))

    cells = list(itertools.product((0, 1, 11), range(20), range(8)))
    numbers = [drawn(*cell) for cell in cells]
    assert len(set(numbers)) == len(cells)
    torch.rand(1000)
    assert [drawn(*cell) for cell in cells] == numbers


def test_a_seed_is_one_that_every_generator_takes() -> None:
    assert all(0 <= step_seed(seed, 0, 0) < 2**63 for seed in range(200))
