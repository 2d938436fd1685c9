"""Whether a repetition came out as the run did: losses, norms, evaluations and weights. Imports no torch by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft_dist.metrics.recorded import recorded_lines, relative

# Values by step, by name.
Series = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class Compared:
    """One kind of value over all steps.

    Args:
        name: its key in ``metrics.jsonl``.
        steps: that both have.
        lost: recorded steps that the repetition does not have.
        first: step of the first difference; None: there is none.
        largest: relative difference, and largest_step, where it is.
    """

    name: str
    steps: int
    lost: int
    first: int | None
    largest: float
    largest_step: int | None


@dataclass(frozen=True)
class Weights:
    """What is in both ``final/``.

    Args:
        equal: to the bit.
        distance: norm of the difference over that of the run's; None: the files of the run are not there.
        largest: difference of one value; largest_name: of the tensor that has it.
    """

    equal: bool
    distance: float | None = None
    largest: float | None = None
    largest_name: str | None = None


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        weights: None: the run was not finished, or its receipt has no digest of them.
    """

    compared: tuple[Compared, ...]
    weights: Weights | None

    @property
    def is_equal(self) -> bool:
        """To the bit, in all that could be compared; where nothing could be, that is no proof."""
        if not self.compared and self.weights is None:
            return False
        same = all(each.first is None and not each.lost for each in self.compared)
        return same and (self.weights is None or self.weights.equal)

    @property
    def largest(self) -> float:
        """The largest relative difference; inf where the repetition lacks steps."""
        values = [math.inf if each.lost else each.largest for each in self.compared]
        if self.weights is not None and self.weights.distance is not None:
            values.append(self.weights.distance)
        return max(values, default=0.0)

    def is_within(self, tolerance: float) -> bool:
        """Whether it came out the same; weights that differ by nobody knows how much need steps that say so."""
        return self.is_equal or (bool(self.compared) and self.largest <= tolerance)


def series_of(folder: Path) -> dict[str, dict[int, float]]:
    """Losses, gradient norms and everything that evaluations measured, by step; NaN where one was not finite."""
    found: dict[str, dict[int, float]] = {}
    for line in recorded_lines(folder):
        for name, value in line.items():
            if name in ("loss", "grad_norm") or name.startswith("eval_loss"):
                found.setdefault(name, {})[int(line["step"])] = math.nan if value is None else float(value)
    return found


def compare_series(then: Series, now: Series) -> tuple[Compared, ...]:
    """Every kind of value that the run recorded."""
    return tuple(_compared(name, then[name], now.get(name, {})) for name in then)


def _compared(name: str, then: Mapping[int, float], now: Mapping[int, float]) -> Compared:
    shared = sorted(then.keys() & now.keys())
    by_step = {step: relative(then[step], now[step]) for step in shared}
    first = next((step for step in shared if by_step[step] > 0), None)
    worst = max(shared, key=lambda step: by_step[step], default=None)
    largest = 0.0 if worst is None else by_step[worst]
    return Compared(name, len(shared), len(then.keys() - now.keys()), first, largest, None if first is None else worst)


def compare_weights(then: Mapping[str, Any], now: Mapping[str, Any], folders: tuple[Path, Path]) -> Weights | None:
    """
    Args:
        then, now: receipts of the run and of the repetition.
        folders: of both.
    """
    if then.get("weights") is None or now.get("weights") is None:
        return None
    if then["weights"] == now["weights"]:
        return Weights(True)
    first, second = (_tensors(folder / "final") for folder in folders)
    if not first or first.keys() != second.keys():
        return Weights(False)
    difference = norm = largest = 0.0
    largest_name = None
    for name, place in first.items():
        one, other = (_read(each, name) for each in (place, second[name]))
        if one.shape != other.shape:
            return Weights(False)
        apart = (one - other).abs()
        difference += float((apart * apart).sum())
        norm += float((one * one).sum())
        if apart.numel() and not float(apart.max()) <= largest:
            largest, largest_name = float(apart.max()), name
    return Weights(False, math.sqrt(difference / norm) if norm else math.inf, largest, largest_name)


def _tensors(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _read(path: Path, name: str) -> Any:
    """In fp64."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name).double()
