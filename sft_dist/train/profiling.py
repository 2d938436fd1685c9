"""``train --profile N``: a trace of N steps of each rank, to open in Perfetto or chrome://tracing, and its summary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sft_dist.runtime.spans import traced
from sft_dist.runtime.whole_file import replace_file
from sft_dist.train.profile_summary import ProfileSummary, summarise

# Steps before the traced ones: the first ones compile, allocate and fill caches.
WARM_UP_STEPS = 3

FOLDER = "profile"


class Profiling:
    """Traces steps of this rank.

    Args:
        folder: the run directory.
        steps: how many.
    """

    def __init__(self, folder: Path, *, rank: int, device: torch.device, steps: int) -> None:
        self.folder, self.rank, self.device, self.steps = folder / FOLDER, rank, device, steps
        self._seen = 0
        self._step_s: list[float] = []
        self._traces = ExitStack()
        self._profile: profile | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around every step; those that are traced end with the device at rest."""
        self._seen += 1
        if self._seen <= WARM_UP_STEPS or len(self._step_s) == self.steps:
            yield
            return
        if self._profile is None:
            self._begin()
        started = time.perf_counter()
        yield
        self._settle()
        self._step_s.append(time.perf_counter() - started)

    @property
    def is_due(self) -> bool:
        """Whether all steps are traced, and the summary is not made yet."""
        return self._profile is not None and len(self._step_s) == self.steps

    @property
    def has_begun(self) -> bool:
        return self._profile is not None

    def finish(self) -> ProfileSummary:
        """Ends the trace and writes it, with its summary."""
        assert self._profile is not None
        profiled, self._profile = self._profile, None
        self._traces.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiled.export_chrome_trace(str(self.folder / f"rank-{self.rank}.trace.json.gz"))
        summary = summarise(profiled.key_averages(), self._step_s, rank=self.rank, device=self.device.type)
        replace_file(self.folder / f"rank-{self.rank}.json", json.dumps(summary.to_json(), indent=2) + "\n")
        return summary

    def close(self) -> None:
        """Ends a trace that nobody finished."""
        self._traces.close()

    def _begin(self) -> None:
        self._settle()
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = self._traces.enter_context(profile(activities=activities))
        self._traces.enter_context(traced())

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
