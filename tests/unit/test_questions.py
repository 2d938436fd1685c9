"""Questions out of prepared rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sft_dist.data.messages import Message
from sft_dist.data.prepared import PreparedData
from sft_dist.evaluation.prompt import PromptRefused
from sft_dist.evaluation.questions import last_answer, questions_of
from sft_dist.evaluation.user_turn import user_turn


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


def chatml(messages: Sequence[Message]) -> str:
    system = "" if messages[0].role == "system" else "<s>system\nBe kind.</s>\n"
    return system + "".join(f"<s>{m.role}\n{m.content}</s>\n" for m in messages) + "<s>assistant\n"


def inst(messages: Sequence[Message]) -> str:
    return "".join(f"[INST] {m.content} [/INST]" if m.role == "user" else f" {m.content}</s>" for m in messages)


@pytest.mark.parametrize("render", [chatml, inst])
def test_what_the_user_said_last(render: object) -> None:
    turn = user_turn(render)  # type: ignore[arg-type]
    assert turn is not None
    user, said = Message("user", "東京は？\n\nIn two words, user."), Message("assistant", "A city")
    for before in ([], [Message("user", "Hello"), said], [Message("system", "Be short.")]):
        if render is chatml or not before or before[0].role == "user":
            assert turn.said(render([*before, user])) == user.content  # type: ignore[operator]
    assert turn.said(render([user, said])) is None, "no turn of the user is last"  # type: ignore[operator]


def test_a_template_that_does_not_tell_where_words_begin() -> None:
    def refuses(_: Sequence[Message]) -> str:
        raise PromptRefused("no", fix="another")

    assert user_turn(refuses) is None
    assert user_turn(lambda messages: "\n".join(m.content for m in messages)) is None
