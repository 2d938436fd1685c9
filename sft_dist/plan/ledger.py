"""Adds up device memory while the tape of a step is played, and remembers the highest moment of each phase."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sft_dist.plan.result import Part, Phase, PhaseName
from sft_dist.plan.tape import Segment, TapePart


@dataclass
class Ledger:
    """Bytes by part at this moment, and at the highest one of each phase."""

    now: Counter[Part] = field(default_factory=Counter)
    phase: PhaseName = "load"
    highest: dict[PhaseName, Phase] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.now.values())

    def begin(self, phase: PhaseName, moment: str = "") -> None:
        self.phase = phase
        self._look(moment)

    def add(self, part: Part, size: int, moment: str = "") -> None:
        """Grows a part by ``size`` bytes, which stay."""
        self.now[part] += size
        if size > 0:
            self._look(moment)

    def touch(self, part: Part, size: int, moment: str) -> None:
        """Takes ``size`` bytes for a moment."""
        self.add(part, size, moment)
        self.add(part, -size)

    def play(self, segment: Segment, moment: str) -> None:
        """Takes what a segment takes at its highest, and goes on with what stays of it."""
        self._look(moment, segment.peak)
        for part, size in segment.net.items():
            self.now[part] += size

    def _look(self, moment: str, more: Mapping[TapePart, int] | None = None) -> None:
        known = self.highest.get(self.phase)
        total = self.total + sum((more or {}).values())
        if known is None or total > known.total_bytes:
            parts: Counter[Part] = Counter(self.now)
            for part, size in (more or {}).items():
                parts[part] += size
            self.highest[self.phase] = Phase(self.phase, {p: n for p, n in parts.items() if n}, moment)
