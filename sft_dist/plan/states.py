"""Bytes that a rank holds, counted from the description of a run; activations by an upper estimate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sft_dist.config.deepspeed import Zero3Knobs
from sft_dist.config.schema import AdamWConfig, LoraMethod, VirtualTokensMethod
from sft_dist.model.describe import describe_dense
from sft_dist.model.loss import CHUNK_BYTES
from sft_dist.model.sequence_parallel import shared_kv_heads
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import registry
from sft_dist.sharding.activation_checkpointing import checkpointed_blocks

GIB = 2**30

# Beside its linear layers' inputs and outputs a block keeps norms, rotated heads and the product before down_proj.
ACTIVATION_FACTOR = 1.5


@dataclass(frozen=True)
class StateBytes:
    """One rank's share between steps, in bytes, without what is in host memory.

    Args:
        parameters: as stored, with all buffers (quantisation state, rotary frequencies).
        gradients: as long as they are accumulated.
        optimizer: its states, and its master weights where these are not the parameters themselves.
        paged: optimizer states in managed memory, of which the GPU holds as many pages as it has room for; not in
            ``total``.
    """

    parameters: int
    gradients: int
    optimizer: int
    paged: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(run: Run) -> StateBytes:
    """Of rank 0, which holds no less than any other rank under every strategy."""
    spec = registry.describe(run, 0)
    parameters = (0 if "parameters" in spec.on_host else spec.parameter_bytes) + run.model.buffer_bytes
    if "optimizer" in spec.on_host:  # gradients go there as they are reduced
        return StateBytes(parameters, 0, 0)
    states = spec.optimizer_state_bytes
    if run.strategy not in ZERO_STAGES:
        gradients = sum(p.local_bytes for p in spec.parameters if p.requires_grad)
        if isinstance(run.optim, AdamWConfig) and run.optim.paged:
            return StateBytes(parameters, gradients, 0, paged=states)
        return StateBytes(parameters, gradients, states)
    # DeepSpeed accumulates in fp32: stage 1 whole gradients, the others what this rank's optimizer updates.
    numel = spec.optimizer_numel
    gradients = DTYPE_BYTES["fp32"] * (run.model.num_trainable if run.strategy == "zero1" else numel)
    return StateBytes(parameters, gradients, numel * DTYPE_BYTES[spec.optimizer_dtype] + states)


def gather_bytes(run: Run) -> int:
    """Whole weights in ``compute`` that live beside the shards while a step runs.

    FSDP2 and ZeRO-3: two blocks (one runs, the next is fetched) and the root, at most. DDP keeps the cast of every
    trainable weight until backward has used it.
    """
    width = DTYPE_BYTES[run.model.compute]
    if run.strategy == "ddp":
        return 0 if run.precision.master == run.precision.compute else run.model.num_trainable * width
    buckets = 0
    if run.deepspeed is not None:
        largest = 2 * run.deepspeed.reduce_bucket_size  # one is reduced while the next fills
        buckets = DTYPE_BYTES[run.precision.compute] * min(largest, 2 * run.model.num_trainable)
        if not isinstance(run.deepspeed, Zero3Knobs):
            return buckets
    by_block = dict.fromkeys(run.model.blocks, 0)
    root = 0
    for parameter in run.model.parameters:
        if parameter.block is None:
            root += parameter.numel
        else:
            by_block[parameter.block] += parameter.numel
    two_largest = sum(sorted(by_block.values())[-2:])
    return (two_largest + root) * width + buckets


def activation_bytes(run: Run) -> int:
    """An upper estimate of what forward keeps for backward when no block is recomputed, for the longest micro-batch.

    For each token here and each layer ``ACTIVATION_FACTOR`` times the inputs and outputs of the block's linear layers
    and what adapters keep beside them: their r numbers in ``compute`` and, with dropout, a mask of one byte an input.
    And the logits of one chunk of the loss with their gradient. Virtual tokens count as tokens of the row that they
    stand before.
    """
    model, parts = run.model, run.batch.sequence_parallel
    # Packed weights have lost their shape: the base is described anew.
    base = describe_dense(model.path, model.revision, model.compute)
    width = sum(sum(p.shape) for p in base.parameters if p.block is not None and len(p.shape) == 2)
    masked = 0
    if isinstance(model.method, LoraMethod):
        inputs = [p.shape for p in model.trainable if ".lora_A." in p.name]  # (r, in)
        width += sum(r for r, _ in inputs)
        masked = sum(size for _, size in inputs) if model.method.dropout else 0
    tokens = -(-run.batch.micro_batch_size * run.batch.max_seq_len // parts)
    if parts > 1:
        # Attention's output is kept twice, as the heads of all tokens and as the tokens with all heads; key and value
        # heads that had to be repeated are kept as often.
        repeated = shared_kv_heads(model.num_kv_heads, parts) - model.num_kv_heads
        width += model.num_layers * model.head_dim * (model.num_heads + 2 * repeated)
    logits = 2 * min(CHUNK_BYTES, tokens * model.vocab_size * DTYPE_BYTES["fp32"])
    tokens += _virtual_tokens(run)
    return int(ACTIVATION_FACTOR * tokens * width * DTYPE_BYTES[model.compute]) + tokens * masked + logits


def checkpoint_bytes(run: Run) -> int:
    """Inputs of the recomputed blocks, kept from forward to backward, for the longest micro-batch; with
    ``activation_checkpointing.offload`` they are in host memory."""
    blocks = checkpointed_blocks(run.activation_checkpointing, run.model.blocks)
    tokens = -(-run.batch.micro_batch_size * run.batch.max_seq_len // run.batch.sequence_parallel) + _virtual_tokens(
        run
    )
    return len(blocks) * tokens * run.model.hidden_size * DTYPE_BYTES[run.model.compute]


def _virtual_tokens(run: Run) -> int:
    """Of a micro-batch."""
    method = run.model.method
    return run.batch.micro_batch_size * method.num_virtual_tokens if isinstance(method, VirtualTokensMethod) else 0


def with_world_size(run: Run, size: int) -> Run:
    """The same run on ``size`` ranks of one node."""
    world = replace(run.world, num_nodes=1, ranks_per_node=size)
    batch = replace(run.batch, world_size=size // run.batch.sequence_parallel)
    return replace(run, world=world, batch=batch)
