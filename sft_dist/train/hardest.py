"""What a run will meet at its hardest, found in the index of its data: no token is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sft_dist.data.batch import BatchPlan
from sft_dist.data.loader import Step, TrainingOrder, dealt
from sft_dist.data.prepared import PreparedData


@dataclass(frozen=True)
class HardStep:
    """A step of the run that holds its most demanding micro-batch.

    Args:
        number: 0-based.
        step: its sequences, in the order that needs most memory (``_not_first``).
        tokens: of the micro-batch, without virtual ones; longest_row: in it.
    """

    number: int
    step: Step
    tokens: int
    longest_row: int


@dataclass(frozen=True)
class _Pass:
    """The micro-batch of one rank: compared by what it takes, then the earliest one."""

    tokens: int
    longest_row: int
    step: int
    number: int


def hardest_steps(order: TrainingOrder, *, first: int, last: int) -> list[HardStep]:
    """The step with the largest micro-batch of any rank and, if no row there is the longest one, the step with that.

    Activations take memory by tokens. Attention takes time by the square of a row, and memory where it has no fused
    kernel.

    Args:
        first, last: 0-based steps of the run, without ``last``.
    """
    data, longest = order.data, order.data.packs.largest(order.data.lengths)
    most_tokens = most_row = _Pass(-1, -1, 0, 0)
    for number in range(first, last):
        sequences = order.step(number).sequences
        tokens = dealt(data.num_tokens[sequences], order.batch).sum(axis=1)
        rows = dealt(longest[sequences], order.batch).max(axis=1)
        # The larger of two sums of one size has the longer row.
        at = np.lexsort((rows.ravel(), tokens.ravel()))[-1]
        found = _Pass(int(tokens.ravel()[at]), int(rows.ravel()[at]), number, int(at) // order.batch.world_size)
        if (found.tokens, found.longest_row) > (most_tokens.tokens, most_tokens.longest_row):
            most_tokens = found
        at = np.lexsort((tokens.ravel(), rows.ravel()))[-1]
        found = _Pass(int(tokens.ravel()[at]), int(rows.ravel()[at]), number, int(at) // order.batch.world_size)
        if (found.longest_row, found.tokens) > (most_row.longest_row, most_row.tokens):
            most_row = found
    chosen = [most_tokens] if most_tokens.longest_row == most_row.longest_row else [most_tokens, most_row]
    return [
        HardStep(each.step, _not_first(order.step(each.step), each.number, order.batch), each.tokens, each.longest_row)
        for each in chosen
    ]


def _not_first(step: Step, number: int, batch: BatchPlan) -> Step:
    """The step with its pass ``number`` later, if it is the first one: only then are gradients there beside it.

    The passes stay what they are, so that only a whole one takes the first one's place.
    """
    size = batch.micro_batch_size * batch.world_size
    if number > 0 or len(step.sequences) < 2 * size:
        return step
    first, second, rest = np.split(step.sequences, [size, 2 * size])
    return replace(step, sequences=np.concatenate([second, first, rest]))


@dataclass(frozen=True)
class HardEvaluation:
    """
    Args:
        data: of each source the sequences of the pass with the largest micro-batch, which are evaluated as in the
            whole set.
        tokens: of the fullest rank in each pass, added up over these passes; all_tokens: over all passes.
        largest: tokens of the largest micro-batch.
    """

    data: PreparedData
    tokens: int
    all_tokens: int
    largest: int


def hardest_evaluation(data: PreparedData, batch: BatchPlan) -> HardEvaluation:
    """The part of an evaluation that shows whether it fits, and how long it takes."""
    chosen = np.zeros(data.num_sequences, np.bool_)
    size = batch.micro_batch_size * batch.world_size
    tokens = all_tokens = largest = 0
    for source in np.unique(data.sequence_sources):
        sequences = np.flatnonzero(data.sequence_sources == source)
        fullest = dealt(data.num_tokens[sequences], batch).sum(axis=1).max(axis=1)
        worst = int(fullest.argmax())
        chosen[sequences[worst * size : (worst + 1) * size]] = True
        tokens += int(fullest[worst])
        all_tokens += int(fullest.sum())
        largest = max(largest, int(fullest[worst]))
    return HardEvaluation(replace(data, packs=data.packs.where(chosen)), tokens, all_tokens, largest)
