"""Recomputes decoder blocks in backward instead of keeping their activations (Chen et al. 2016, arXiv 1604.06174).

Checkpoints are torch's non-reentrant ones under every strategy. They keep a block's input and run the block again in
backward; ``selective`` keeps the results of its dearest operators too, which then are not run again; ``offload`` keeps
the input in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers torch_attn::_varlen_attn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts as selective_contexts

from sft_dist.config.schema import ActivationCheckpointingConfig
from sft_dist.model.build import SftModel
from sft_dist.model.cpu_attention import packed_attention
from sft_dist.model.lora import LoraLinear

ATTENTION = frozenset(
    {
        packed_attention._opoverload,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)

PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})

# A product with a low-rank factor costs little to repeat, and its result may be as large as any other.
LOW_RANK = 256


def checkpointed_blocks(config: ActivationCheckpointingConfig, blocks: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the blocks that are recomputed."""
    if config.mode == "none":
        return ()
    return blocks[:: config.k or 1]


ToHost = Callable[[Tensor], Tensor]


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    pinned = tensor.device.type == "cuda"
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
    # Both copies are in the stream that computes, so that the one back cannot overtake the one there.
    return host.copy_(tensor, non_blocking=pinned)


def apply_activation_checkpointing(
    model: SftModel, config: ActivationCheckpointingConfig, *, to_host: ToHost = to_host
) -> None:
    """Call before sharding, so that a block is gathered once around its recomputation and names stay what they are.

    Args:
        to_host: copies what ``offload`` keeps in host memory.
    """
    blocks = model.blocks()
    for name in checkpointed_blocks(config, tuple(blocks)):
        block = blocks[name]
        options: dict[str, Any] = {"use_reentrant": False}
        if config.mode == "selective":
            options["context_fn"] = partial(_keep_the_dearest, wide_products(block))
            for module in block.modules():
                if isinstance(module, LoraLinear):
                    module.base_product_is_kept = True
        run = partial(checkpoint, block.forward, **options)
        block.forward = partial(_with_input_on_host, run, to_host) if config.offload else run


def wide_products(block: nn.Module) -> int:
    """How many linear layers of a block are no low-rank factors."""
    return sum(is_wide(m.in_features, m.out_features) for m in block.modules() if isinstance(m, nn.Linear))


def is_wide(in_features: int, out_features: int) -> bool:
    return min(in_features, out_features) > LOW_RANK


def _keep_the_dearest(num_products: int) -> tuple[Any, Any]:
    return selective_contexts(KeepTheDearest(num_products))


class KeepTheDearest:
    """Which results of a block stay: attention's, and every second matrix product's, as in torchtitan.

    Counted so that the last product is not among them: only the block's output needs that, backward never does. Of
    Llama's seven they are k_proj, o_proj and up_proj. Low-rank products are neither counted nor kept.
    """

    def __init__(self, num_products: int) -> None:
        self.kept = (num_products + 1) % 2
        # Forward and recomputation see the same operators in the same order, each from the beginning.
        self.products = {False: 0, True: 0}

    def __call__(self, context: SelectiveCheckpointContext, op: Any, *args: Any, **_: Any) -> CheckpointPolicy:
        if op in ATTENTION:
            return CheckpointPolicy.MUST_SAVE
        if op in PRODUCTS and is_wide(*args[-1].shape):  # the right factor of mm and addmm
            self.products[context.is_recompute] += 1
            if self.products[context.is_recompute] % 2 == self.kept:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def _with_input_on_host(
    run: Callable[..., Any], to_host: ToHost, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Runs a checkpointed block; of what it keeps, its input moves to host memory until backward.

    The rest is the block's own results under ``selective``, which stay, and what all blocks share, such as the rotary
    angles. On the CPU the input is copied, which saves nothing and takes the same way.
    """

    shape = hidden_states.shape

    def pack(tensor: Tensor) -> Any:
        # What is saved here are the checkpoint's arguments; what the block saves goes through the checkpoint's hooks.
        # This function lives until backward: it must not hold the input itself.
        return (tensor.device, to_host(tensor)) if tensor.shape == shape else tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        back = torch.empty(host.shape, dtype=host.dtype, device=device)
        return back.copy_(host, non_blocking=True)

    with saved_tensors_hooks(pack, unpack):
        return run(hidden_states, *args, **kwargs)
