"""Recomputes decoder blocks in backward instead of keeping their activations (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from functools import partial

from torch.utils.checkpoint import checkpoint

from sft_dist.config.schema import ActivationCheckpointingConfig
from sft_dist.model.build import SftModel


def checkpointed_blocks(config: ActivationCheckpointingConfig, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the blocks that are recomputed."""
    if config.mode == "none":
        return ()
    return blocks[:: config.k or 1]


def apply_activation_checkpointing(model: SftModel, config: ActivationCheckpointingConfig) -> None:
    """Call before sharding, so that a block is gathered once around its recomputation and names stay what they are."""
    blocks = model.blocks()
    for name in checkpointed_blocks(config, tuple(blocks)):
        block = blocks[name]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
