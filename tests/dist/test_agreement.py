"""What ranks agree on at the end of a step."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
import torch.distributed as dist

from sft_dist.train.agreement import Agreed, Agreement
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]


def agree(said: list[list[tuple[int, bool, bool]]]) -> list[Agreed]:
    """Agreements, one after the other; ``said`` is by agreement, then by rank."""
    agreement, rank = Agreement(), dist.get_rank()
    found = []
    for of in said:
        number, is_due, has_failed = of[rank]
        agreement.begin(signal=number, save_is_due=is_due, save_failed=has_failed)
        found.append(agreement.reached())
    return found


def one_is_late(kind: str) -> tuple[float, Agreed]:
    """Seconds that ``begin`` took while the other rank was not there yet, and what came of it."""
    agreement, rank = Agreement(), dist.get_rank()
    if kind == "begun twice":
        agreement.begin(signal=0, save_is_due=rank == 1, save_failed=True)
    dist.barrier()
    if rank == 1:
        time.sleep(1.5)
    started = time.perf_counter()
    agreement.begin(signal=0, save_is_due=rank == 1, save_failed=False)
    took_s = time.perf_counter() - started
    assert agreement.is_begun
    agreed = agreement.reached()
    assert not agreement.is_begun
    return took_s, agreed


def test_what_one_rank_knows_all_do(world: World) -> None:
    usr1, term = int(signal.SIGUSR1), int(signal.SIGTERM)
    said = [
        [(0, False, False), (0, False, False)],
        [(0, True, False), (0, False, False)],
        [(0, False, False), (usr1, False, True)],
        [(usr1, False, False), (term, False, False)],
    ]
    expected = [
        Agreed(0, False, False), Agreed(0, True, False), Agreed(usr1, False, True), Agreed(term, False, False)
    ]  # fmt: skip
    assert world(2).run(agree, said) == [expected] * 2


@pytest.mark.parametrize("kind", ["once", "begun twice"])
def test_beginning_waits_for_nobody_and_the_last_word_counts(world: World, kind: str) -> None:
    for took_s, agreed in world(2).run(one_is_late, kind):
        assert took_s < 1.0
        assert agreed == Agreed(0, True, False)
