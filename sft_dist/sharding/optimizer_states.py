"""What an optimizer keeps for each parameter, as arithmetic. Imports no torch."""

from __future__ import annotations

import math

from sft_dist.config.schema import AdafactorConfig, SgdConfig
from sft_dist.model.spec import DTYPE_BYTES, ParameterSpec
from sft_dist.run import Run

# Of the 8-bit moments: elements that share one fp32 scale, and the size from which a parameter is stored so. Both are
# those of bitsandbytes, whose kernel has the first built in.
BLOCK_SIZE = 256
MIN_8BIT_NUMEL = 4096


def is_8bit(run: Run, numel: int) -> bool:
    """Whether the moments of a parameter of ``numel`` elements, over all ranks, are stored in 8 bits."""
    return run.precision.optimizer_state == "8bit" and numel >= MIN_8BIT_NUMEL


def state_bytes(run: Run, parameter: ParameterSpec, local_numel: int, largest_local_numel: int) -> int:
    """Bytes that a rank's optimizer keeps for its ``local_numel`` elements of a parameter.

    Args:
        largest_local_numel: of any rank: all of them have as many 8-bit scales as the one that needs most.
    """
    if isinstance(run.optim, AdafactorConfig):
        if len(parameter.shape) < 2:
            return local_numel * DTYPE_BYTES["fp32"]
        row = math.prod(parameter.shape[1:])
        return (local_numel // row + row) * DTYPE_BYTES["fp32"]
    if isinstance(run.optim, SgdConfig):
        return local_numel * DTYPE_BYTES[run.precision.master] if run.optim.momentum > 0 else 0
    if is_8bit(run, parameter.numel):
        return 2 * (local_numel + num_blocks(largest_local_numel) * DTYPE_BYTES["fp32"])
    return 2 * flat_moment_bytes(run, local_numel)


def flat_moment_bytes(run: Run, numel: int) -> int:
    """Bytes of one AdamW moment of ``numel`` elements that is not stored in 8 bits."""
    return numel * DTYPE_BYTES["bf16" if run.precision.optimizer_state == "bf16" else "fp32"]


def num_blocks(numel: int) -> int:
    return -(-numel // BLOCK_SIZE)
