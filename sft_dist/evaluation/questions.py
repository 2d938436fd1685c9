"""Questions out of prepared rows: what stands before a row's last answer, and that answer.

Prepared rows are on every node already, also where their files are not, and are tokenised as in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.prepared import PreparedData


@dataclass(frozen=True)
class RowQuestion:
    """
    Args:
        prompt: token ids that an answer goes on from, at least one.
        reference: token ids of the row's own answer, with what ends it.
        source: name of the data source.
    """

    prompt: tuple[int, ...]
    reference: tuple[int, ...]
    source: str


def questions_of(data: PreparedData, *, most: int | None, seed: int) -> list[RowQuestion]:
    """Questions of up to ``most`` rows, chosen by the seed, in the order of their rows.

    Rows without a question are passed over: documents, which are answers from their first token on, and rows whose
    answer was cut off.
    """
    order = np.random.Generator(np.random.PCG64(seed)).permutation(data.num_rows)
    found = islice(((row, question) for row in order.tolist() for question in _question(data, row)), most)
    return [question for _, question in sorted(found, key=lambda each: each[0])]


def _question(data: PreparedData, row: int) -> Iterator[RowQuestion]:
    ids, supervised = data.row(row)
    span = last_answer(supervised)
    if span is not None and span[0] > 0:
        begin, end = span
        yield RowQuestion(
            prompt=tuple(ids[:begin].tolist()),
            reference=tuple(ids[begin:end].tolist()),
            source=data.sources[int(data.rows[row]["store"])],
        )


def last_answer(supervised: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Bounds of the last run of supervised tokens; None: there is none."""
    places = np.flatnonzero(supervised)
    if not len(places):
        return None
    breaks = np.flatnonzero(np.diff(places) > 1)
    begin = places[breaks[-1] + 1] if len(breaks) else places[0]
    return int(begin), int(places[-1]) + 1
