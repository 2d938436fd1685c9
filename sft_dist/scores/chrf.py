"""chrF2 (Popović 2015) as sacrebleu computes it, from counts that can be added up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sft_dist.scores.answered import Answered
from sft_dist.scores.tally import Array

ORDERS = 6
BETA = 2


@dataclass(frozen=True)
class Chrf:
    """Counts of n examples.

    Args:
        statistics: [n, 18]: for each length of 1 to 6 characters the n-grams of the answer (0 if the reference has
            none of this length), of the reference, and those that match.
    """

    statistics: Array

    def value(self, counts: Array) -> Array:
        return chrf_of_sums(counts @ self.statistics)

    def part(self, rows: Sequence[int]) -> Chrf:
        return Chrf(self.statistics[list(rows)])


def count_chrf(examples: Sequence[Answered]) -> Chrf:
    rows = [_count(example.answer, example.reference) for example in examples]
    return Chrf(np.array(rows, dtype=np.float64))


def chrf_of_sums(sums: Array) -> Array:
    """chrF, 0 to 100: the F-score of precision and recall, each a mean over the lengths that both sides have.

    Args:
        sums: [k, 18], statistics of ``Chrf`` added up.

    Returns:
        [k].
    """
    answer, reference, match = (sums[:, first::3] for first in range(3))
    is_there = (answer > 0) & (reference > 0)
    orders = np.maximum(is_there.sum(axis=1), 1)
    precision = np.where(is_there, match / np.maximum(answer, 1), 0).sum(axis=1) / orders
    recall = np.where(is_there, match / np.maximum(reference, 1), 0).sum(axis=1) / orders
    weighted = BETA**2 * precision + recall
    has_match = weighted > 0
    value: Array = 100 * (1 + BETA**2) * precision * recall / np.where(has_match, weighted, 1)
    return np.where(has_match, value, 0.0)


def chrf_signature() -> str:
    """sacrebleu's signature of the same settings."""
    from sacrebleu.metrics.chrf import CHRF

    metric = CHRF(char_order=ORDERS, beta=BETA)
    metric.corpus_score([""], [[""]])  # which tells it the number of references
    return str(metric.get_signature())


def _count(answer: str, reference: str) -> list[int]:
    answer, reference = "".join(answer.split()), "".join(reference.split())
    counts = []
    for order in range(1, ORDERS + 1):
        wanted = _ngrams(reference, order)
        found = _ngrams(answer, order)
        match = sum(min(count, wanted[ngram]) for ngram, count in found.items() if ngram in wanted)
        counts += [found.total() if wanted else 0, wanted.total(), match]
    return counts


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))
