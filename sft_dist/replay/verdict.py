"""What is said of a repetition, and ``replay.json``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft_dist.config.secrets import without_secrets
from sft_dist.errors import CheckpointError
from sft_dist.replay.here import Difference, Found
from sft_dist.replay.outcome import Compared, Outcome
from sft_dist.replay.receipt import Recorded
from sft_dist.runtime.whole_file import replace_file

# In the run directory of the repetition.
REPLAY = "replay.json"

# Of the file.
FORMAT = 1


def verdict(outcome: Outcome, tolerance: float) -> str:
    """In one line."""
    if not outcome.compared and outcome.weights is None:
        return "nothing to compare: neither metrics.jsonl of the run nor a digest of its weights is there"
    if outcome.is_equal:
        return f"bit-equal: {_what(outcome)}"
    first = _first(outcome)
    if outcome.is_within(tolerance):
        return f"within {outcome.largest:.1e} of it, {first}"
    lost = next((each for each in outcome.compared if each.lost), None)
    if lost is not None:
        return f"differs: {lost.lost:,} recorded values of {lost.name} did not come again"
    if not outcome.compared:
        return "differs: the weights, by how much is not known without the run's metrics.jsonl and final/"
    return f"differs by {outcome.largest:.1e} ({_worst(outcome)}), {first}"


def _what(outcome: Outcome) -> str:
    parts = [f"{each.name} of {each.steps:,} steps" for each in outcome.compared]
    return ", ".join([*parts, *(["final weights"] if outcome.weights is not None else [])])


def _first(outcome: Outcome) -> str:
    differing = [(each.first, each.name) for each in outcome.compared if each.first is not None]
    if not differing:
        return "the final weights alone differ"
    step = min(step for step, _ in differing)
    names = ", ".join(name for at, name in differing if at == step)
    return f"first difference at step {step:,} ({names})"


def _worst(outcome: Outcome) -> str:
    worst: Compared | None = max(outcome.compared, key=lambda each: each.largest, default=None)
    if worst is None or worst.largest < outcome.largest:
        return "final weights"
    return f"{worst.name} at step {worst.largest_step:,}"


def lines_of(
    recorded: Recorded, outcome: Outcome, found: Found, after: Sequence[Difference], tolerance: float
) -> list[str]:
    """What people read.

    Args:
        after: what the receipts of both differ in.
    """
    lines = [f"replay    of {recorded.path}: {verdict(outcome, tolerance)}"]
    weights = outcome.weights
    if weights is not None and weights.distance is not None:
        lines.append(
            f"weights   differ by {weights.largest:.1e} at most ({weights.largest_name}), "
            f"{weights.distance:.1e} of their norm"
        )
    if found.by_user:
        lines.append("with      " + "; ".join(map(str, found.by_user)) + " (by you)")
    known = {each.name for each in (*found.by_user, *found.numbers)}
    others = [str(each) for each in (*found.numbers, *after) if each.name not in known or each in found.numbers]
    if others and not outcome.is_equal:
        lines.append("and       " + "; ".join(others))
    return lines


def write_replay(
    folder: Path, recorded: Recorded, overrides: Sequence[str], found: Found, after: Sequence[Difference],
    outcome: Outcome, tolerance: float,
) -> None:  # fmt: skip
    """Writes ``replay.json`` into the run directory of the repetition.

    Raises:
        CheckpointError: it cannot be written.
    """
    document: dict[str, Any] = {
        "format": FORMAT,
        "receipt": str(recorded.path),
        "overrides": [_without_secrets(text) for text in overrides],
        "verdict": verdict(outcome, tolerance),
        "is_equal": outcome.is_equal,
        "is_within": outcome.is_within(tolerance),
        "tolerance": tolerance,
        "compared": [_plain(asdict(each)) for each in outcome.compared],
        "weights": None if outcome.weights is None else _plain(asdict(outcome.weights)),
        "before": asdict(found),
        "after": [asdict(each) for each in after],
    }
    try:
        replace_file(folder / REPLAY, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{folder / REPLAY} cannot be written: {error.strerror}", fix="make room there"
        ) from error


def _without_secrets(override: str) -> str:
    key, equals, value = override.partition("=")
    return f"{key}{equals}{without_secrets(value, key)}"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Numbers that JSON does not know as text."""
    return {key: str(each) if each in (float("inf"),) or each != each else each for key, each in value.items()}
