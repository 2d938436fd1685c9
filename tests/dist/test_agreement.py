"""What ranks agree on at the end of a step."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch.distributed as dist

from sft_dist.train.agreement import Agreed, Agreement
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]


def agree(said: list[list[tuple[int, bool, bool]]]) -> list[Agreed]:
    """Agreements, one after the other; ``said`` is by agreement, then by rank."""
    agreement, rank = Agreement(), dist.get_rank()
    return [agreement.reached(signal=of[rank][0], save_is_due=of[rank][1], save_failed=of[rank][2]) for of in said]


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
