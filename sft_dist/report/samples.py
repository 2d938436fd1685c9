"""``samples.jsonl`` of a run: what the model answered to the same prompts as it learned."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sft_dist.report.model import Answer, Sample

# In the run directory, a line for each answer.
SAMPLES = "samples.jsonl"


class SampleLine(BaseModel):
    """One answer; what else a line has is left alone."""

    step: int
    sample: int
    prompt: str
    answer: str
    reference: str | None = None
    question: str | None = None
    finish_reason: str = "stop"


@dataclass
class _Gathered:
    prompt: str
    reference: str | None
    answers: dict[int, Answer]


def read_samples(folder: Path, notes: list[str]) -> tuple[Sample, ...]:
    """Of a run directory; none where it has no such file.

    Args:
        notes: gets a line where lines cannot be read.
    """
    try:
        content = (folder / SAMPLES).read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        notes.append(f"{SAMPLES} cannot be read: {error.strerror or error}")
        return ()
    samples, unread = parse_samples(content.splitlines(keepends=True))
    if unread:
        notes.append(f"{unread} lines of {SAMPLES} cannot be read")
    return samples


def parse_samples(lines: Iterable[bytes]) -> tuple[tuple[Sample, ...], int]:
    """By number, and how many whole lines were no sample. Of two answers at a step, the later line counts."""
    gathered: dict[int, _Gathered] = {}
    unread = 0
    for text in lines:
        if not text.endswith(b"\n"):
            continue  # being written
        try:
            line = SampleLine.model_validate(json.loads(text))
        except (ValueError, ValidationError):
            unread += bool(text.strip())
            continue
        one = gathered.setdefault(line.sample, _Gathered(line.question or line.prompt, line.reference, {}))
        one.answers[line.step] = Answer(line.step, line.answer, line.finish_reason == "length")
    return tuple(
        Sample(number, one.prompt, one.reference, tuple(one.answers[step] for step in sorted(one.answers)))
        for number, one in sorted(gathered.items())
    ), unread
