"""What a plan says that answers cost, against what they take when they are generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sft_dist.config.schema import Config
from sft_dist.hardware.gpus import find_gpu
from sft_dist.model.row_cache import RowCache
from sft_dist.plan.activations import trace
from sft_dist.plan.answers import answering, cache_bytes, kv_bytes_per_token, planned_answers
from sft_dist.plan.memory import memory_phases
from sft_dist.plan.result import DataPlan, Range
from sft_dist.plan.time import plan_time
from sft_dist.resolve import resolve
from sft_dist.runtime.world import WorldShape
from tests.helpers import cells, counted_answers, generation
from tests.helpers.loaded import load_model
from tests.helpers.pool import WorldPool
from tests.unit.test_row_cache import batch

World = Callable[[int], WorldPool]

NEW = 21


def data_of(*, eval_rows: int, evaluations: int = 3) -> DataPlan:
    """Rows of 20 tokens, half of them supervised."""
    tokens = Range(2000, 2000, 2000)
    return DataPlan(
        "prepared", 100, tokens, 1000, 100, 40_000, 1.0, 0.0, 15, 1.0, 1, 140, 20.0 * eval_rows, evaluations, 0, "test"
    )


def config(base: Path, method: str = "lora", strategy: str = "ddp", **answers: Any) -> Config:
    asked = {
        "every_steps": 7,
        "scores": {"metrics": ["chrf"]},
        "samples": {"from_eval": 2, "prompts": ["one", "two"]},
        "answers": {"max_new_tokens": NEW, "rows_at_once": 3, **answers},
    }
    files = {"train": [{"path": "unused"}], "eval": [{"path": "unused"}]}
    return cells.config(str(base), method, strategy, data=files, eval=asked)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", "lora"), ("qwen3", "full"), ("gpt2", "full"), ("llama", "prefix"), ("llama", "prompt")],
)
@torch.no_grad()
def test_planned_bytes_of_a_token_are_those_of_the_real_cache(
    tiny_base: Path, tmp_path: Path, kind: str, method: str
) -> None:
    base = tiny_base if kind == "llama" else generation.build_base(tmp_path, kind)
    run = resolve(cells.config(str(base), method, data={"max_seq_len": 32}), WorldShape())
    model = load_model(run.model, seed=0).eval()
    rows = [torch.arange(3, 3 + n) for n in (9, 1, 14)]
    positions = [torch.arange(len(row)) for row in rows]
    cache = RowCache()
    model(batch(rows, positions, torch.tensor([8, 9, 23])), logits=True, cache=cache)
    virtual = 5 * len(rows) if method in ("prefix", "prompt") else 0
    assert counted_answers.bytes_of(cache) == (24 + virtual) * kv_bytes_per_token(run.model)
    cache.keep([0, 2], room=8)
    left = 23 + virtual * 2 // 3 + 2 * 8
    assert counted_answers.bytes_of(cache) == left * kv_bytes_per_token(run.model)


@pytest.mark.parametrize(("strategy", "ranks"), [("fsdp2", 2), pytest.param("zero3", 3, marks=pytest.mark.ci)])
def test_planned_passes_and_tokens_are_the_most_that_there_are(
    world: World, tiny_base: Path, strategy: str, ranks: int
) -> None:
    cfg = config(tiny_base, strategy=strategy, max_examples=None)
    run = resolve(cfg, WorldShape(1, ranks))
    planned = planned_answers(run, data_of(eval_rows=11))
    assert planned is not None
    assert planned.questions == 11 + 2 + 2
    # Nothing ends these: as many as planned, and rows as long as they may be.
    longest = [list(range(3, 3 + cfg.data.max_seq_len - 1))] * planned.questions
    how = {"max_new_tokens": NEW, "stop_ids": [], "rows_at_once": 3}
    full = world(ranks).run(counted_answers.generated, cells.dump(cfg), longest, how)
    assert max(each.passes for each in full) == planned.passes == -(-5 // ranks) * NEW
    assert sum(each.tokens for each in full) == planned.tokens == 15 * NEW
    assert max(each.rows for each in full) == planned.rows == 3
    held = max(each.cache_bytes for each in full)
    layers = run.model.num_layers
    assert held == 3 * (cfg.data.max_seq_len - 1 + NEW - 1) * kv_bytes_per_token(
        run.model
    )  # the last token is not kept
    assert held < cache_bytes(run) <= (held + 3 * kv_bytes_per_token(run.model)) * (1 + 1.5 / layers)
    # A real evaluation takes no more.
    for found, replies in world(ranks).run(counted_answers.examined, cells.dump(cfg)):
        assert 0 < found.passes <= planned.passes
        assert found.cache_bytes < cache_bytes(run)
        assert replies in (0, planned.questions)


def test_how_many_questions(tiny_base: Path) -> None:
    def questions(data: DataPlan, **answers: Any) -> tuple[int, int] | None:
        planned = planned_answers(resolve(config(tiny_base, **answers), WorldShape(1, 2)), data)
        return None if planned is None else (planned.questions, planned.evaluations)

    assert questions(data_of(eval_rows=11), max_examples=5) == (5 + 4, 3)
    assert questions(data_of(eval_rows=1)) == (1 + 2 + 1, 3)
    assert questions(data_of(eval_rows=11), when="ends") == (11 + 4, 2)
    assert questions(data_of(eval_rows=0, evaluations=0)) is None
    silent = config(tiny_base).model_copy(update={"eval": config(tiny_base).eval.model_copy(
        update={"scores": None, "samples": None})})  # fmt: skip
    assert planned_answers(resolve(silent, WorldShape()), data_of(eval_rows=11)) is None


def test_the_tables_have_them_by_name(tiny_base: Path) -> None:
    run, data = resolve(config(tiny_base), WorldShape()), data_of(eval_rows=11)
    tape, eval_tape = trace(run), trace(run, backward=False)
    answer_tape = trace(answering(run), backward=False)
    with_answers = {p.name: p for p in memory_phases(run, tape, eval_tape, answer_tape)}
    without = {p.name: p for p in memory_phases(run, tape, eval_tape)}
    assert with_answers["eval"].parts["answers"] == cache_bytes(run)
    assert "answers" not in without["eval"].parts
    assert {n: p for n, p in with_answers.items() if n != "eval"} == {n: p for n, p in without.items() if n != "eval"}
    gpu = find_gpu("A100-SXM-80GB")
    time = plan_time(run, tape, data=data, gpu=gpu, eval_tape=eval_tape, answer_tape=answer_tape)
    plain = plan_time(run, tape, data=data, gpu=gpu, eval_tape=eval_tape)
    assert time.total.value - plain.total.value == pytest.approx(time.phases["answers"])
    assert "answers" not in plain.phases
    # Twice the questions of a rank take twice as long; on twice as many ranks, half of it.
    more = replace(data, eval_tokens=20.0 * 26)  # 30 questions: 10 groups
    both = plan_time(run, tape, data=more, gpu=gpu, eval_tape=eval_tape, answer_tape=answer_tape).phases["answers"]
    assert both == pytest.approx(2 * time.phases["answers"])
