"""DeepSpeed's engine: what it is told, and what it cannot do."""

from __future__ import annotations

from typing import Any

import torch

from sft_dist.config.schema import AdafactorConfig, AdamWConfig
from sft_dist.run import ZERO_STAGES, Run
from sft_dist.sharding.refusal import Refusal


def unsupported(run: Run) -> Refusal | None:
    """Why ZeRO cannot do what the run asks for, or None."""
    return _unsupported_optimizer(run) or _knobs_without_effect(run)


def _unsupported_optimizer(run: Run) -> Refusal | None:
    flat = f"and under {run.strategy} an optimizer sees flat partitions that begin and end inside tensors"
    other = "or sharding.strategy to fsdp2 or ddp"
    if isinstance(run.optim, AdafactorConfig):
        return Refusal(
            f"optim.type adafactor needs whole rows and columns of a matrix, {flat}",
            f"set optim.type to adamw, {other}",
        )
    if run.precision.optimizer_state == "8bit":
        return Refusal(
            f"precision.optimizer_state 8bit needs blocks of one tensor for checkpoints to read, {flat}",
            f"set precision.optimizer_state to bf16, {other}",
        )
    if isinstance(run.optim, AdamWConfig) and run.optim.paged:
        return Refusal(
            f"optim.paged has its own way to host memory, and {run.strategy} has another, offload_optimizer",
            f"set optim.paged to false, {other}",
        )
    return None


def _knobs_without_effect(run: Run) -> Refusal | None:
    """Stage 1 with bf16 has an optimizer of its own, ``BF16_Optimizer``, which reads one knob."""
    if run.strategy != "zero1" or run.precision.compute != "bf16":
        return None
    assert run.deepspeed is not None
    if run.deepspeed.offload_optimizer.device == "cpu":
        return None
    ours, default = run.deepspeed.model_dump(), type(run.deepspeed)().model_dump()
    turned = [name for name in ours if ours[name] != default[name] and name != "allgather_bucket_size"]
    if not turned:
        return None
    return Refusal(
        f"zero_optimization.{' and '.join(turned)} {'has' if len(turned) == 1 else 'have'} no effect in stage 1 with "
        "precision.compute bf16, unless the optimizer is offloaded; stage 2 reads all knobs",
        f"remove {'it' if len(turned) == 1 else 'them'}, or set sharding.strategy to zero2",
    )


def deepspeed_config(run: Run) -> dict[str, Any]:
    """The engine's configuration; every key that changes numbers is set, none is left to a default."""
    assert run.deepspeed is not None
    bf16 = run.precision.compute == "bf16"
    zero = {"stage": ZERO_STAGES[run.strategy], **run.deepspeed.model_dump()}
    if run.deepspeed.overlap_comm is None:
        zero["overlap_comm"] = torch.cuda.is_available()
    # A bucket is allocated in full, however little trains: one that holds all of it is never flushed early either.
    zero["reduce_bucket_size"] = min(run.deepspeed.reduce_bucket_size, run.model.num_trainable)
    # DeepSpeed keeps smaller parameters whole on every rank, most adapters among them.
    zero["stage3_param_persistence_threshold"] = 0
    return {
        "train_micro_batch_size_per_gpu": run.batch.micro_batch_size,
        # The loop counts micro-batches, because the last step of an epoch may have fewer.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": run.optim.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        # Torch's AdamW updates on the host too: DeepSpeed's own is compiled at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": run.precision.reduce,
        "zero_optimization": zero,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def import_deepspeed() -> Any:
    """DeepSpeed without what a CPU has no use for.

    Its shared-memory collectives compile for a minute at the first start, and gloo serves; its NVTX ranges, thousands a
    step, tell a profiler of GPUs where a call begins.
    """
    import deepspeed
    import deepspeed.ops
    import deepspeed.utils.nvtx

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.nvtx.enable_nvtx = torch.cuda.is_available()
    return deepspeed
