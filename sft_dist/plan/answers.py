"""What it costs to have questions answered at evaluations (``eval.scores``, ``eval.samples``): most that it may be.

Every answer is taken to reach ``eval.answers.max_new_tokens``, and every prompt, for memory, the longest row of the
data. Time is an estimate: a pass over one token of each row is that of a short micro-batch, and no faster than the
memory gives the weights and the keys and values of the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sft_dist.config.schema import VirtualTokensMethod
from sft_dist.model.spec import DTYPE_BYTES, ModelSpec
from sft_dist.plan.result import Assumption, DataPlan
from sft_dist.run import Run

if TYPE_CHECKING:
    from sft_dist.config.eval_schema import EvalConfig


@dataclass(frozen=True)
class AnswersPlan:
    """Of one evaluation at which questions are answered.

    Args:
        questions: most that are asked, of all ranks.
        groups: of questions that the busiest rank answers one after the other.
        rows: of a group; max_new_tokens: of an answer.
        evaluations: so many in the whole run.
    """

    questions: int
    groups: int
    rows: int
    max_new_tokens: int
    evaluations: int

    @property
    def passes(self) -> int:
        """Most forward passes of a rank: each has a token of every row, and the first one reads the prompts."""
        return self.groups * self.max_new_tokens

    @property
    def tokens(self) -> int:
        """Most tokens that are generated, of all ranks."""
        return self.questions * self.max_new_tokens


def answers(settings: EvalConfig) -> bool:
    """Whether anything is answered."""
    return settings.scores is not None or settings.samples is not None


def planned_answers(run: Run, data: DataPlan) -> AnswersPlan | None:
    """None where nothing is answered, or nothing held out is known. Rows of ``eval.samples.file`` are not counted."""
    settings = run.eval
    if not answers(settings) or not data.evaluations:
        return None
    held_out = math.ceil(data.eval_tokens * data.rows / data.tokens.value)
    questions = 0
    if settings.scores is not None:
        most = settings.answers.max_examples
        questions += held_out if most is None else min(held_out, most)
    if settings.samples is not None:
        questions += len(settings.samples.prompts) + min(held_out, settings.samples.from_eval)
    groups = -(-questions // settings.answers.rows_at_once)
    ends = 1 + settings.before_training
    return AnswersPlan(
        questions=questions,
        groups=-(-groups // run.world.size),
        rows=min(questions, settings.answers.rows_at_once),
        max_new_tokens=settings.answers.max_new_tokens,
        evaluations=data.evaluations if settings.answers.when == "always" else min(ends, data.evaluations),
    )


def kv_bytes_per_token(model: ModelSpec) -> int:
    """Of the keys and values of all layers for one token of a row."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * DTYPE_BYTES[model.compute]


def cache_bytes(run: Run) -> int:
    """Most that the keys and values of a group's rows take, its answers among them, while rows are dropped too: the
    layer that is being moved is there twice, and one of its halves a third time."""
    model, settings = run.model, run.eval.answers
    row = run.data.max_seq_len - 1 + settings.max_new_tokens  # a question is no whole row
    if model.max_positions is not None:
        row = min(row, model.max_positions)
    if isinstance(model.method, VirtualTokensMethod):
        row += model.method.num_virtual_tokens
    of_rows = settings.rows_at_once * row * kv_bytes_per_token(model)
    return of_rows + 3 * of_rows // (2 * model.num_layers)


def answering(run: Run) -> Run:
    """The run with the micro-batch that reads the prompts of a group."""
    rows = run.eval.answers.rows_at_once
    batch = replace(run.batch, micro_batch_size=rows, global_batch_size=max(rows, run.batch.global_batch_size))
    return replace(run, batch=replace(batch, sequence_parallel=1))


def read_bytes(run: Run, *, row_tokens: float, rows: int) -> float:
    """Of a pass over one token of each row: every weight in ``compute``, and what is kept of the rows."""
    weights = run.model.num_parameters * DTYPE_BYTES[run.precision.compute]
    return weights + rows * row_tokens * kv_bytes_per_token(run.model)


def assumptions_of_answers(run: Run, planned: AnswersPlan | None) -> tuple[Assumption, ...]:
    """What a plan of answers takes for granted."""
    if planned is None:
        return ()
    return (
        Assumption(
            f"{planned.questions:,} questions are answered at {planned.evaluations:,} evaluations, every answer with "
            f"{planned.max_new_tokens:,} tokens; {planned.rows} rows at a time, of at most max_seq_len",
            "eval.answers, eval.scores, eval.samples; an estimate",
        ),
    )
