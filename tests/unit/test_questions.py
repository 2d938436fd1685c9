"""Questions out of prepared rows."""

from __future__ import annotations

import numpy as np
import pytest

from sft_dist.data.prepared import PreparedData
from sft_dist.evaluation.questions import last_answer, questions_of


@pytest.mark.parametrize(
    ("mask", "bounds"),
    [([0, 0, 1, 1], (2, 4)), ([0, 1, 1, 0, 0, 1, 0], (5, 6)), ([1, 1], (0, 2)), ([0, 0], None), ([0, 1, 0], (1, 2))],
)
def test_the_last_answer_of_a_row(mask: list[int], bounds: tuple[int, int] | None) -> None:
    assert last_answer(np.array(mask, np.uint8)) == bounds


def test_rows_without_a_question_are_passed_over() -> None:
    document, cut = ([1, 2, 3], [1, 1, 1]), ([4, 5], [0, 0])
    data = PreparedData.of([document, ([6, 7, 8, 9], [0, 1, 0, 1]), cut])
    [only] = questions_of(data, most=None, seed=0)
    assert (only.prompt, only.reference, only.source) == ((6, 7, 8), (9,), "rows")


def test_the_seed_chooses_and_the_order_is_that_of_the_rows() -> None:
    data = PreparedData.of([([n, n + 100], [0, 1]) for n in range(50)])
    chosen = [[question.prompt[0] for question in questions_of(data, most=10, seed=seed)] for seed in (1, 1, 2)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert all(each == sorted(each) and len(set(each)) == 10 for each in chosen)
    assert len(questions_of(data, most=None, seed=1)) == 50
