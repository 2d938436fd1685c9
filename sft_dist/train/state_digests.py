"""Digests of a rank's state: whether a step, or reading a checkpoint, has left the very bits."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor

from sft_dist.sharding.strategy import Strategy

# Bytes that are hashed at a time: what is on a GPU comes through the host.
DIGEST_BYTES = 1 << 26


def state_digests(strategy: Strategy) -> dict[str, str]:
    """XXH3-128 of the bits of everything on this rank that a step changes: what a checkpoint holds, what the forward
    pass reads, and how many steps the optimizer has counted. Every rank calls it."""
    strategy.release()
    state = strategy.state()
    digests = {name: _digest(shard.values) for name, shard in state.items()}
    for name, tensor, is_trained in strategy.local_parameters():
        if is_trained:
            shard = state[f"model.{name}"]
            # Under ZeRO-3 the last ranks' parts are padded with what nothing reads.
            is_part = tensor.numel() < max(shard.numel, 2)
            real = tensor.view(-1)[: shard.values.numel()] if is_part else tensor
            digests[f"forward.{name}"] = _digest(real)
    states = strategy.base_optimizer().state.values()
    return digests | {"steps": str([int(state["step"]) for state in states if "step" in state])}


def _digest(tensor: Tensor) -> str:
    result, flat = xxhash.xxh3_128(), tensor.detach().contiguous().view(-1)
    for part in flat.split(max(1, DIGEST_BYTES // flat.element_size())):
        result.update(part.cpu().view(torch.uint8).numpy().data)
    return result.hexdigest()
