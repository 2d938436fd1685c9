"""How long a phase may go without progress, in seconds."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

from sft_dist.config.watchdog_schema import Limit, WatchdogConfig
from sft_dist.metrics.heartbeat import Doing
from sft_dist.runtime.progress import Part

Key = Literal["init", "data", "step", "eval", "save", "export"]

# The least that `auto` is. Nothing here is a usual time: a healthy run is orders of magnitude below.
INIT_S, FIRST_STEP_S, STEP_S, EVAL_S, SAVE_S, EXPORT_S = 1200.0, 1200.0, 300.0, 600.0, 600.0, 1200.0

TIMES_A_STEP = 10
# Steps whose median is taken, and as many as there must be: the first ones compile and fill caches.
RECENT_STEPS, LEAST_STEPS = 100, 5

# Of a shared disk on a bad day, for one rank; assumed where this process has measured nothing.
SLOW_BYTES_PER_S = 100e6

# What is smaller measures how long a disk takes to answer, not how much it takes in.
LEAST_BYTES = 64 << 20

KEYS: dict[Doing, Key | None] = {
    "preparing": None,  # hours of tokenising are in order
    "loading": "init",
    "rehearsing": "export",  # all of it, the export too
    "training": "step",
    "evaluating": "eval",
    "saving": "save",
    "exporting": "export",
    "proving": "export",
}


class Limits:
    """Of one process.

    Args:
        config: what the user set.
    """

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        self._model_bytes = self._saved_bytes = 0
        self._planned_step_s = self._save_s = 0.0
        self._read_bytes = 0
        self._read_bytes_per_s: float | None = None
        self._written_bytes_per_s: float | None = None
        self._steps: deque[float] = deque(maxlen=RECENT_STEPS)

    def planned(self, *, model_bytes: int, saved_bytes: int, step_s: float | None) -> None:
        """What is known of the run before it trains.

        Args:
            model_bytes: of all parameters as they are stored.
            saved_bytes: that this rank writes into a checkpoint.
            step_s: of a step, by the plan; None: not planned.
        """
        self._model_bytes, self._saved_bytes, self._planned_step_s = model_bytes, saved_bytes, step_s or 0.0

    def stepped(self, seconds: float) -> None:
        """A step of this process took so long."""
        self._steps.append(seconds)

    def read(self, num_bytes: int, seconds: float) -> None:
        """So much of the weights was read since the reading began, in so long."""
        if num_bytes >= max(LEAST_BYTES, 2 * self._read_bytes):
            self._read_bytes, self._read_bytes_per_s = num_bytes, num_bytes / seconds

    def saved(self, num_bytes: int, seconds: float) -> None:
        """This rank has written its part of a checkpoint and read it back, in so long."""
        self._save_s = max(self._save_s, seconds)
        if num_bytes >= LEAST_BYTES:
            self._written_bytes_per_s = min(self._written_bytes_per_s or math.inf, num_bytes / seconds)

    def of(self, phase: Doing, part: Part) -> float | None:
        """Seconds without progress; None: no limit."""
        key = self.key(phase, part)
        if key is None:
            return None
        given: Limit = getattr(self._config, f"{key}_s")
        if given == "off":
            return None
        return self._auto(key) if given == "auto" else given

    def key(self, phase: Doing, part: Part) -> Key | None:
        """Which of the limits counts: that of the phase, but for a rank that waits for its own data."""
        key = KEYS[phase]
        return "data" if part == "data" and key == "step" else key

    def _auto(self, key: Key) -> float:
        if key == "init":
            return INIT_S + self._model_bytes / (self._read_bytes_per_s or SLOW_BYTES_PER_S)
        if key == "save":
            return SAVE_S + (self._save_s or self._saved_bytes / SLOW_BYTES_PER_S)
        if key == "export":
            return EXPORT_S + 2 * self._model_bytes / (self._written_bytes_per_s or SLOW_BYTES_PER_S)
        step_s = self._step_s()
        return max(step_s, EVAL_S) if key == "eval" else step_s

    def _step_s(self) -> float:
        if len(self._steps) < LEAST_STEPS:
            return FIRST_STEP_S + TIMES_A_STEP * self._planned_step_s
        return max(STEP_S, TIMES_A_STEP * statistics.median(self._steps))
