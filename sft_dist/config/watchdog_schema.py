"""``watchdog``: how long a rank may make no progress before the run is ended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sft_dist.config.section import Section

Limit = Annotated[float, Field(gt=0)] | Literal["auto", "off"]
"""Seconds; auto: from what this run measures; off: for ever."""


class WatchdogConfig(Section):
    """Seconds without progress after which a run ends with exit code 8, by phase.

    Time in which a process is suspended does not count. auto is long enough for every healthy run: docs/launching.md.
    """

    enabled: bool = Field(True, description="false: a run that hangs is not ended, nor looked at.")
    init_s: Limit = Field(
        "auto",
        description="Until all have met, and between two tensors that are loaded; off: for ever. auto: 20 minutes, and "
        "the time to read the model as fast as so far; before 64 MiB are read, at 100 MB/s.",
    )
    data_s: Limit = Field("auto", description="A rank waits for its own next micro-batch. auto: as step_s.")
    step_s: Limit = Field(
        "auto",
        description="Between two micro-batches, or from the last one to the end of the step. auto: 10 times the median "
        "of this process's steps, at least 5 minutes; in its first steps 20 minutes and 10 planned steps.",
    )
    eval_s: Limit = Field(
        "auto", description="Between two micro-batches of an evaluation. auto: as step_s, at least 10 minutes."
    )
    save_s: Limit = Field(
        "auto",
        description="Between two blocks of a checkpoint that are written or read back. auto: 10 minutes, and the time "
        "that this rank's slowest save took; before the first, to write its part at 100 MB/s.",
    )
    export_s: Limit = Field(
        "auto",
        description="Between two tensors of final/, and for its proof. auto: 20 minutes, and the time to read and "
        "write the model at the speed of this rank's slowest save of 64 MiB or more; without one, at 100 MB/s.",
    )
