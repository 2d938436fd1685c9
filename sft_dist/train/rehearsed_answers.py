"""The longest questions of an evaluation, answered as in the run: whether they fit, and how long all of them take."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from sft_dist.data.prepared import PreparedData
from sft_dist.evaluation.decode import generate
from sft_dist.evaluation.questions import questions_of
from sft_dist.plan.answers import answers
from sft_dist.run import Run
from sft_dist.runtime.world import World
from sft_dist.sharding.strategy import Strategy


@dataclass(frozen=True)
class HardQuestions:
    """Of an evaluation.

    Args:
        prompts: the longest ones, as many as a rank answers at a time.
        groups: that the busiest rank answers, one after the other.
    """

    prompts: tuple[tuple[int, ...], ...]
    groups: int


def hardest_questions(run: Run, data: PreparedData, world_size: int) -> HardQuestions | None:
    """None where no row of ``data`` is answered. Rows of ``eval.samples.file`` are not counted."""
    if not answers(run.eval):
        return None
    settings, samples = run.eval.answers, run.eval.samples
    judged = [] if run.eval.scores is None else questions_of(data, most=settings.max_examples, seed=run.seed)
    shown = [] if samples is None else questions_of(data, most=samples.from_eval, seed=run.seed)
    prompts = sorted((row.prompt for row in (*judged, *shown)), key=len, reverse=True)
    if not prompts:
        return None
    number = len(prompts) + (0 if samples is None else len(samples.prompts))
    groups = -(-number // settings.rows_at_once)
    return HardQuestions(tuple(prompts[: settings.rows_at_once]), -(-groups // world_size))


def answer_hardest(
    run: Run, strategy: Strategy, hard: HardQuestions, *, world: World, device: torch.device
) -> tuple[float, str]:
    """Seconds of all answers of an evaluation at most, and what is said; every rank answers the same questions."""
    most = run.eval.answers.max_new_tokens
    started = time.perf_counter()
    # No token ends an answer: each is as long as it may be.
    generate(
        strategy, list(hard.prompts) * world.size, max_new_tokens=most, stop_ids=(), rank=world.rank,
        world_size=world.size, device=device, rows_at_once=len(hard.prompts),
    )  # fmt: skip
    seconds = time.perf_counter() - started
    longest = len(hard.prompts[0])
    rows = len(hard.prompts)
    said = f"{rows} question{'' if rows == 1 else 's'} of up to {longest:,} tokens, answers of {most:,}"
    return seconds * hard.groups, said
