"""What a run wrote down of its steps, and how far that of two runs goes together. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.metrics.logger import METRICS


@dataclass(frozen=True)
class Apart:
    """How far two runs went together.

    Args:
        equal_steps: first steps whose losses and gradient norms are equal to the bit.
        shared_steps: steps that both have.
        largest: relative difference of a loss over the shared steps, and the step of it.
    """

    equal_steps: int
    shared_steps: int
    largest: float
    largest_step: int


def recorded_lines(folder: Path) -> list[dict[str, Any]]:
    """Of ``metrics.jsonl``, without one that is being written or damaged; none where the file cannot be read."""
    try:
        texts = (folder / METRICS).read_bytes().splitlines(keepends=True)
    except OSError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def recorded_steps(folder: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by step; NaN where they were not finite."""
    steps = {}
    for line in recorded_lines(folder):
        if "loss" in line:
            steps[int(line["step"])] = (_number(line["loss"]), _number(line.get("grad_norm")))
    return steps


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def apart(first: Mapping[int, tuple[float, float]], second: Mapping[int, tuple[float, float]]) -> Apart | None:
    """None: they have no step in common.

    Args:
        first, second: (loss, gradient norm) by step.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        return None
    equal = next((place for place, step in enumerate(shared) if not _same(first[step], second[step])), len(shared))
    by_step = {step: relative(first[step][0], second[step][0]) for step in shared}
    worst = max(shared, key=lambda step: by_step[step])
    return Apart(equal, len(shared), by_step[worst], worst)


def _same(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one, other, strict=True))


def relative(one: float, other: float) -> float:
    """The difference of two values over the larger one; two that are no numbers are the same."""
    if math.isnan(one) or math.isnan(other):
        return 0.0 if math.isnan(one) and math.isnan(other) else math.inf
    return abs(one - other) / max(abs(one), abs(other)) if one != other else 0.0
