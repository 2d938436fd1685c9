"""What was chosen, in a file that grows by a line a choice, and what it comes to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from sft_dist.review.pairs import Comparison, Pair, is_swapped

# left and right: that answer is better; tie: both are good; bad: neither is.
Choice = Literal["left", "right", "tie", "bad"]
CHOICES: tuple[str, ...] = get_args(Choice)

# Of the normal distribution, for 95 %.
Z = 1.959964


class Votes:
    """The choices of one reviewer; every one is on the disk when ``choose`` returns.

    Args:
        file: of earlier choices, which count, with whatever seed they were made; a line that was cut short does not.
        seed: of the sides.
    """

    def __init__(self, file: Path, *, seed: int) -> None:
        self._file, self._seed = file, seed
        self.by_pair: dict[str, Choice] = {}
        for line in file.read_bytes().splitlines() if file.exists() else ():
            try:
                noted = json.loads(line)
            except ValueError:
                continue
            self._count(noted["pair"], self._on_its_side(noted))

    def _on_its_side(self, noted: dict[str, Any]) -> Choice | None:
        """The choice of a line, by the sides of this seed."""
        if noted["better"] is None:
            choice: Choice | None = noted["choice"]
            return choice
        return "left" if (noted["better"] == "second") == is_swapped(noted["pair"], self._seed) else "right"

    def choose(self, pair: Pair, choice: Choice | None) -> None:
        """
        Args:
            choice: None: takes the last one back.

        Raises:
            OSError: it cannot be written, and does not count.
        """
        left = 1 if pair.is_swapped(self._seed) else 0
        better = {"left": left, "right": 1 - left}.get(choice or "")
        line = {
            "pair": pair.id, "choice": choice, "better": None if better is None else ("first", "second")[better],
            "prompt": pair.prompt, "left": pair.answers[left], "right": pair.answers[1 - left],
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        self._file.parent.mkdir(parents=True, exist_ok=True)
        # The line break comes first where an earlier line was cut short: nothing may be written behind that.
        written = self._file.read_bytes() if self._file.exists() else b""
        begin = "" if written.endswith(b"\n") or not written else "\n"
        with self._file.open("a", encoding="utf-8") as file:
            file.write(begin + json.dumps(line, ensure_ascii=False) + "\n")
        self._count(pair.id, choice)

    def _count(self, pair: str, choice: Choice | None) -> None:
        if choice is None:
            self.by_pair.pop(pair, None)
        else:
            self.by_pair[pair] = choice

    def tally(self, comparison: Comparison) -> Tally:
        """Of the pairs of a comparison."""
        counts = {"first": 0, "second": 0, "tie": 0, "bad": 0}
        for pair in comparison.pairs:
            choice = self.by_pair.get(pair.id)
            if choice in ("left", "right"):
                is_second = (choice == "left") == pair.is_swapped(self._seed)
                counts["second" if is_second else "first"] += 1
            elif choice is not None:
                counts[choice] += 1
        return Tally(**counts, open=len(comparison.pairs) - sum(counts.values()))


@dataclass(frozen=True)
class Tally:
    """
    Args:
        first, second: pairs in which that one was better. tie: both good, bad: neither. open: not looked at yet.
    """

    first: int
    second: int
    tie: int
    bad: int
    open: int

    @property
    def decided(self) -> int:
        return self.first + self.second

    def share(self) -> tuple[float, float, float] | None:
        """Of the decided pairs, those in which the second is better, and its 95 % interval (Wilson 1927)."""
        if not self.decided:
            return None
        n, p = self.decided, self.second / self.decided
        middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        return p, max(0.0, middle - half), min(1.0, middle + half)

    def chance(self) -> float | None:
        """How often a difference as large comes of nothing: the two-sided sign test on the decided pairs."""
        if not self.decided:
            return None
        n, most = self.decided, max(self.first, self.second)
        tail = sum(math.comb(n, k) for k in range(most, n + 1)) / 2**n
        return min(1.0, 2 * tail)
