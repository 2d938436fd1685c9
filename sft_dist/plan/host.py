"""Memory of the machines that hold the GPUs: what the processes of one node take together."""

from __future__ import annotations

from sft_dist.config.schema import Fsdp2Sharding
from sft_dist.model.spec import DTYPE_BYTES
from sft_dist.plan.activations import seq_lens_of
from sft_dist.plan.disk import save_host_bytes
from sft_dist.plan.states import state_bytes
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding import registry
from sft_dist.sharding.activation_checkpointing import checkpointed_blocks

# Python with torch, CUDA's libraries, transformers and DeepSpeed imported and a CUDA context: resident, a process.
PROCESS_BYTES = int(4.5 * 2**30)


def host_parts(run: Run) -> dict[str, int]:
    """Bytes of host memory of the node that needs most, the first one, by what takes them."""
    ranks = run.world.ranks_per_node
    parts = {
        "processes": ranks * PROCESS_BYTES,
        "weights on their way": ranks * _largest_part(run),
        "offloaded states": ranks * offloaded_bytes(run),
        "paged states": ranks * state_bytes(run).paged,
        "offloaded activations": ranks * _offloaded_activations(run),
        "saving": save_host_bytes(run),
    }
    return {name: size for name, size in parts.items() if size}


def offloaded_bytes(run: Run) -> int:
    """Parameters, gradients and optimizer states of one rank that are kept in host memory."""
    spec = registry.describe(run, 0)
    size = spec.parameter_bytes if "parameters" in spec.on_host else 0
    if "optimizer" not in spec.on_host:
        return size
    width = DTYPE_BYTES["fp32"] if run.strategy in ZERO_STAGES else DTYPE_BYTES[spec.optimizer_dtype]
    gradients = spec.optimizer_numel * width
    # FSDP2's masters are the parameters themselves.
    masters = 0 if isinstance(run.sharding, Fsdp2Sharding) else spec.optimizer_numel * DTYPE_BYTES[spec.optimizer_dtype]
    return size + gradients + masters + spec.optimizer_state_bytes


def _offloaded_activations(run: Run) -> int:
    """Inputs of the recomputed layers, from forward to backward."""
    if not run.activation_checkpointing.offload:
        return 0
    blocks = checkpointed_blocks(run.activation_checkpointing, run.model.blocks)
    tokens = -(-sum(seq_lens_of(run)) // run.batch.sequence_parallel)
    return len(blocks) * tokens * run.model.hidden_size * DTYPE_BYTES[run.model.compute]


def _largest_part(run: Run) -> int:
    """Of the tensor that is read while the rest is where it belongs: what the rank keeps of the largest."""
    return max(shard.local_bytes for shard in registry.describe(run, 0).parameters)
