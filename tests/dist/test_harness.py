"""lm-eval's requests: answered as by its own ``hf`` model, on any number of processes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sft-dist[lm-eval]'")

from lm_eval.models.huggingface import HFLM

from sft_dist.errors import ConfigError
from sft_dist.evaluation.harness import _check_generation
from sft_dist.evaluation.likelihood import Span, _passes, _rows
from tests.helpers import cells, harness
from tests.helpers.pool import WorldPool

World = Callable[[int], WorldPool]


@pytest.mark.parametrize(
    ("method", "strategy", "ranks"),
    [
        ("full", "fsdp2", 3),
        *(
            pytest.param(*cell, marks=pytest.mark.ci)
            for cell in [("full", "ddp", 2), ("full", "zero3", 3), ("qlora", "fsdp2", 2), ("qlora", "zero3", 2)]
        ),
    ],
)
def test_one_process_and_three_answer_as_lm_evals_own_model(
    world: World, tiny_base: Path, tmp_path: Path, method: str, strategy: str, ranks: int
) -> None:
    final = tmp_path / "final"
    cfg = cells.dump(cells.config(str(tiny_base), method, strategy))
    alone_cfg = cells.dump(cells.config(str(tiny_base), method, "ddp"))
    found = world(ranks).run(harness.answered, cfg, harness.REQUESTS, 0.05)
    (alone,) = world(1).run(harness.answered, alone_cfg, harness.REQUESTS, 0.05, str(final))
    for each in found:
        assert each == alone
    likelihoods, sums, texts, notes = alone
    assert notes == ["requests longer than the model's 512 positions lost their beginning"]
    if method == "qlora":  # bitsandbytes' own layers compute in another dtype in eval mode
        return
    theirs: Any = HFLM(pretrained=str(final), dtype="float32", batch_size=2, device="cpu")
    their_likelihoods, their_sums, their_texts = harness.ask_all(theirs, harness.REQUESTS)
    for (ours, is_greedy), (expected, is_theirs_greedy) in zip(likelihoods, their_likelihoods, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
        assert is_greedy == is_theirs_greedy
    assert sums == pytest.approx(their_sums, rel=1e-5)
    assert texts == their_texts
    assert len(set(texts)) == len(texts)


def test_what_is_most_probable_is_greedy(world: World, tiny_base: Path) -> None:
    """The model's own answer, asked for as a continuation, and with one token changed."""
    found = world(2).run(
        harness.own_answers_as_continuations, cells.dump(cells.config(str(tiny_base), "full", "fsdp2"))
    )
    for each in found:
        assert [likelihood.is_greedy for likelihood in each] == [True, False, False, True, False, False]


def test_choices_of_one_token_share_a_row() -> None:
    spans = [
        Span((1, 2, 3), (4,)),
        Span((1, 2, 3), (5,)),
        Span((1, 2), (3, 4)),
        Span((9,), (8, 7)),
        Span((1, 2), (3, 6)),
    ]
    rows = _rows(spans)
    assert [(row.inputs, row.spans, row.last) for row in rows] == [
        ((1, 2, 3), (0, 1), (4, 5)), ((1, 2, 3), (2, 4), (4, 6)), ((9, 8), (3,), (7,)),
    ]  # fmt: skip
    assert [[row.inputs for row in each] for each in _passes(rows, 8, max_scored=3)] == [
        [(1, 2, 3), (1, 2, 3)], [(9, 8)],
    ]  # fmt: skip


def test_ways_of_generating_that_are_not_there() -> None:
    greedy = {"until": [], "max_gen_toks": 3, "do_sample": False, "temperature": 0.0}
    _check_generation({**greedy, "top_p": 0.9, "num_beams": 1})
    _check_generation({**greedy, "do_sample": True, "temperature": 0.7, "top_p": 1.0})
    for changed, key in (
        ({"num_beams": 4}, "num_beams"), ({"do_sample": True, "top_p": 0.9}, "top_p"), ({"strange": 1}, "strange"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"generation_kwargs.{key}"):
            _check_generation({**greedy, **changed})
    assert torch.is_grad_enabled()
