"""What a run is about to do, in a few lines: every derived number is shown before the first step."""

from __future__ import annotations

from sft_dist.data.prepared import PreparedData
from sft_dist.run import Run
from sft_dist.sharding.spec import ShardingSpec


def summary(
    run: Run, spec: ShardingSpec, train_data: PreparedData, eval_data: PreparedData | None, *, num_steps: int
) -> str:
    """Model, sharding, precision, data and schedule, one line each."""
    batch, precision = run.batch, run.precision
    total = sum(p.numel for p in run.model.parameters)
    kind = "packs" if run.data.packing == "best_fit" else "rows"
    tokens, supervised = int(train_data.num_tokens.sum()), int(train_data.num_supervised.sum())
    held_out = f"; eval: {eval_data.num_rows:,} rows" if eval_data is not None else ""
    stored = precision.stored(trainable=True, strategy=run.strategy)
    return "\n".join(
        [
            f"model     {run.model.path}: {run.model.method.type}, {run.model.num_trainable:,} trainable "
            f"of {total:,} stored elements",
            f"sharding  {run.strategy} on {run.world.size} ranks, verified: rank 0 holds "
            f"{spec.parameter_bytes / 2**20:,.1f} MiB of parameters and {spec.optimizer_numel:,} optimizer elements; "
            f"activation checkpointing {run.activation_checkpointing.mode}",
            f"precision compute {precision.compute}, trainable stored in {stored}, master {spec.optimizer_dtype}, "
            f"gradients reduced in {precision.reduce}",
            f"data      {train_data.num_rows:,} rows in {train_data.num_sequences:,} {kind}, {tokens:,} tokens, "
            f"{supervised:,} supervised ({supervised / tokens:.0%}){held_out}",
            f"schedule  {num_steps:,} steps of {batch.global_batch_size} {kind}: {batch.world_size} ranks x "
            f"{batch.gradient_accumulation_steps} micro-batches of up to {batch.micro_batch_size}",
        ]
    )
