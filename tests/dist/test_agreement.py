"""What ranks agree on at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch.distributed as dist

from sft_dist.train.agreement import Agreed, Agreement
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]


def agree(said: list[list[tuple[int, bool]]]) -> list[Agreed]:
    """Agreements, one after the other; ``said`` is by agreement, then by rank."""
    agreement, rank = Agreement(), dist.get_rank()
    return [agreement.reached(signal=of[rank][0], save_is_due=of[rank][1]) for of in said]


def test_what_one_rank_knows_all_do(world: World) -> None:
    usr1, term = int(signal.SIGUSR1), int(signal.SIGTERM)
    said = [
        [(0, False), (0, False)],
        [(0, True), (0, False)],
        [(0, False), (usr1, False)],
        [(usr1, False), (term, False)],
    ]
    expected = [Agreed(0, False), Agreed(0, True), Agreed(usr1, False), Agreed(term, False)]
    assert world(2).run(agree, said) == [expected] * 2
