"""``spikes``: what a run does about a loss that jumps, and about one that is not a number.

PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1) and OPT (Zhang et al. 2022, arXiv 2205.01068, section 2.5)
went back to an earlier checkpoint by hand, PaLM without the batches around the spike. Megatron-LM calls a loss a spike
that is ten times the largest one seen; in fine-tuning that is more than guessing costs (the logarithm of the
vocabulary's size, 10 to 12), so the factor here is smaller, and of a median, which a spike does not move.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sft_dist.config.section import Section


class SpikesConfig(Section):
    policy: Literal["off", "warn", "skip", "roll_back"] = Field(
        "warn",
        description="When the loss of a step is a spike. warn: say so; skip: do not apply the step's update, for which "
        "in every step the host waits for the device, until its loss is known; roll_back: go back to the last "
        "checkpoint, of which one is saved before the first step, and train on from there without the step.",
    )
    factor: float = Field(
        4.0, gt=1, description="A loss is a spike when it is more than this many times the median of the last ones."
    )
    window: int = Field(
        50, ge=1, description="Steps whose losses the median is of; after half of them a spike can be told."
    )
    max_in_a_row: int = Field(
        3, ge=1, description="Most steps in a row that are left out; one more ends the run with exit code 6."
    )
    max_roll_backs: int = Field(
        10, ge=1, description="Most returns to a checkpoint in a run; one more ends it with exit code 6."
    )
    non_finite: Literal["stop", "skip", "roll_back"] = Field(
        "stop",
        description="When a loss or a gradient norm is not finite. stop: end the run with exit code 6; skip, "
        "roll_back: as in policy, with the same wait in every step for skip.",
    )
