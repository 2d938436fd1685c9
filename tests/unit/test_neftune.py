"""The noise of NEFTune: its bounds by each row's own length, and that it is a row's own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from sft_dist.config.schema import FullMethod
from sft_dist.data.batch import BatchPlan, MicroBatch
from sft_dist.data.loader import Part, TrainingOrder, collate, micro_batches
from sft_dist.model.describe import describe_model
from sft_dist.model.neftune import add_noise
from tests.helpers.cells import synthetic_data
from tests.helpers.loaded import load_model

WIDTH, ALPHA = 64, 5.0


def noise(batch: MicroBatch, rank_in_group: int = 0) -> torch.Tensor:
    return add_noise(torch.zeros(batch.input_ids.shape[1], WIDTH), batch, alpha=ALPHA, rank_in_group=rank_in_group)


def test_each_row_of_a_pack_has_the_bound_of_its_own_length() -> None:
    batch = replace(collate(synthetic_data(), [0, 1, 2]), row_seeds=(11, 12, 13))
    for part, length in zip(noise(batch).split(batch.seq_lens), batch.seq_lens, strict=True):
        bound = ALPHA / math.sqrt(length * WIDTH)
        assert 0.9 * bound < float(part.abs().max()) <= bound
        # Uniform within +- b: the variance is b^2 / 3.
        assert abs(float(part.std()) / (bound / math.sqrt(3)) - 1) < 0.1
        assert abs(float(part.mean())) < 0.1 * bound


def test_a_row_has_its_noise_wherever_it_is() -> None:
    """In another pack, in another order, and in parts that ranks share."""
    data = synthetic_data()
    together = noise(replace(collate(data, [0, 1, 2]), row_seeds=(11, 12, 13)))
    lengths = [len(data.row(row)[0]) for row in (0, 1, 2)]
    alone = noise(replace(collate(data, [1]), row_seeds=(12,)))
    assert torch.equal(together.split(lengths)[1], alone)
    parts = [
        noise(replace(collate(data, [0, 1, 2], Part(number, 3)), row_seeds=(11, 12, 13)), number) for number in range(3)
    ]
    assert torch.equal(torch.cat(parts), together)


def test_what_only_fills_a_batch_has_none() -> None:
    data = synthetic_data()
    short = min(range(data.num_rows), key=lambda row: len(data.row(row)[0]))
    length = len(data.row(short)[0])
    of = length + 2
    parts = [noise(replace(collate(data, [short], Part(number, of)), row_seeds=(9,)), number) for number in range(of)]
    whole = torch.cat(parts)
    assert len(whole) == of
    assert whole[:length].abs().min() > 0
    assert not whole[length:].any()


def test_seeds_are_of_the_step_and_the_row_on_any_number_of_ranks() -> None:
    data = synthetic_data()
    seen: list[dict[int, int]] = []
    for world_size in (1, 3):
        plan = BatchPlan(global_batch_size=7, micro_batch_size=2, world_size=world_size, max_seq_len=48)
        order = TrainingOrder(data, plan, seed=3)
        step = order.step(2)
        seeds: dict[int, int] = {}
        for rank in range(world_size):
            for batch, _ in micro_batches(data, plan, step.sequences, rank, step.seed):
                starts = [0, *torch.tensor(batch.seq_lens).cumsum(0).tolist()]
                seeds |= {
                    hash(tuple(batch.input_ids[0, start : start + length].tolist())): seed
                    for start, length, seed in zip(starts, batch.seq_lens, batch.row_seeds, strict=False)
                }
        seen.append(seeds)
        assert order.step(3).seed != step.seed != TrainingOrder(data, plan, seed=4).step(2).seed
    assert seen[0] == seen[1]
    assert len(set(seen[0].values())) == len(seen[0]) > 7
    batch, _ = next(micro_batches(data, plan, step.sequences, 0))
    assert batch.row_seeds == (), "nothing is drawn in an evaluation"


def test_a_model_in_training_alone_has_it(tiny_base: Path) -> None:
    model = load_model(describe_model(str(tiny_base), None, FullMethod(), "fp32"), seed=0)
    batch = replace(collate(synthetic_data(), [0, 1, 2]), row_seeds=(11, 12, 13))
    plain = float(model(batch).detach())
    model.neftune_alpha = ALPHA
    noisy = float(model(batch).detach())
    assert noisy != plain
    assert float(model(batch).detach()) == noisy, "drawn by the row's seed alone"
    assert float(model(replace(batch, row_seeds=())).detach()) == plain
    model.eval()
    assert float(model(batch).detach()) == plain
