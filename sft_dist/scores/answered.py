"""One answer, and what it is judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answered:
    """An answer that was generated.

    Args:
        prompt: what was asked, as text.
        answer: what was generated, without special tokens; may be empty.
        reference: the right or wished-for answer.
        source: name of the data source that the prompt is from.
    """

    prompt: str
    answer: str
    reference: str
    source: str
