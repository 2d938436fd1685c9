"""Which rank keeps the others waiting, from what each takes for its own part of a step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from sft_dist.train.stragglers import Forwards, RankTimes, forward_waits, line_of, of_ranks, seconds, slow
from tests.helpers import cells


def rank(number: int, *, data: float = 0.01, forward: float = 0.3, step: float = 1.0, waits: bool = False) -> RankTimes:
    return RankTimes(number, f"n{number}", 50, data, data, forward, forward, step, step, forward_waits=waits)


def test_a_slow_rank_is_named() -> None:
    assert slow([rank(0), rank(1), rank(2), rank(3, forward=0.7)]) == (
        "slow: rank 3 on n3 takes 0.710 s a step for its data (0.010 s) and forward, the median rank 0.310 s"
    )
    told = slow([rank(0), rank(1), rank(2, data=0.4), rank(3, forward=0.7), rank(4)])
    assert told is not None
    assert told.endswith("the median rank 0.310 s, and 1 more")


def test_nobody_is_slow() -> None:
    assert slow([rank(0)]) is None
    assert slow([rank(0), rank(1, forward=0.4), rank(2)]) is None, "less than 1.5 times"
    assert slow([rank(0, forward=0.01), rank(1, forward=0.05), rank(2, forward=0.01)]) is None, "of no weight in a step"


def test_where_a_forward_waits_for_others_the_data_tell() -> None:
    """The others wait for its weights in their forward, so that all of them take as long for both."""
    times = [rank(0, forward=0.7, waits=True), rank(1, data=0.4, forward=0.31, waits=True)]
    times.append(rank(2, forward=0.7, waits=True))
    assert slow(times) == "slow: rank 1 on n1 takes 0.400 s a step for its data, the median rank 0.010 s"
    assert slow([rank(0, waits=True), rank(1, forward=0.9, waits=True)]) is None, "nobody knows whose it is"
    assert "; forward, with its waits for other ranks, at most 0.700 s on rank 0 (n0)" in line_of(times)
    assert of_ranks(times)["ranks"][0]["forward_waits"] is True


@pytest.mark.parametrize(
    ("strategy", "share", "waits"), [("ddp", 1, False), ("zero2", 1, False), ("fsdp2", 1, True), ("zero3", 1, True),
                                     ("ddp", 2, True)],
)  # fmt: skip
def test_where_it_does(tiny_base: Path, strategy: str, share: int, waits: bool) -> None:
    cfg = cells.config(str(tiny_base), "full", strategy, sharding={"strategy": strategy, "sequence_parallel": share})
    assert forward_waits(resolve(cfg, WorldShape(1, 2))) is waits


def test_the_line_and_the_receipt() -> None:
    times = [rank(0), rank(1, data=0.2), rank(2, forward=0.4)]
    assert line_of(times) == (
        "ranks     a step waits for data at most 0.200 s on rank 1 (n1), median 0.010 s; "
        "forward at most 0.400 s on rank 2 (n2), median 0.300 s"
    )
    (first, *_) = of_ranks(times)["ranks"]
    assert (first["rank"], first["host"], first["data_wait_p95_s"], first["step_s"]) == (0, "n0", 0.01, 1.0)


def test_forward_passes_of_training_are_timed() -> None:
    class Slow(nn.Module):
        def forward(self) -> None:
            time.sleep(0.02)

    model = Slow()
    forwards = Forwards(model, torch.device("cpu"))
    model()
    model()
    with torch.no_grad():
        model()
    marks = forwards.take()
    assert len(marks) == 2
    assert seconds(marks) == pytest.approx(0.04, abs=0.03)
    forwards.close()
    model()
    assert forwards.take() == []
