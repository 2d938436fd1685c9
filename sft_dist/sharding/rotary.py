"""What rotary frequencies that depend on the longest row do not go together with: rows must not change each other."""

from __future__ import annotations

from sft_dist.config.schema import VirtualTokensMethod
from sft_dist.run import Run
from sft_dist.sharding.refusal import Refusal


def unsupported(run: Run) -> Refusal | None:
    """Why the run cannot have rows of its length, or None."""
    rope, batch, method = run.model.dynamic_rope, run.batch, run.model.method
    virtual = method.num_virtual_tokens if isinstance(method, VirtualTokensMethod) else 0
    if rope is None or batch.max_seq_len + virtual <= rope.from_tokens:
        return None
    in_front = f" and {virtual} virtual tokens" if virtual else ""
    rows = f"data.max_seq_len {batch.max_seq_len}{in_front}: in rows of more than {rope.from_tokens} tokens"
    shorter = f"set data.max_seq_len to at most {rope.from_tokens - virtual}"
    if rope.has_memory:
        return Refusal(f"{rows} {run.model.path} has rotary frequencies that depend on the rows before", shorter)
    if run.data.packing == "none" and batch.micro_batch_size == 1 and batch.sequence_parallel == 1:
        return None
    return Refusal(
        f"{rows} {run.model.path} has other rotary frequencies, which then hold for all rows of a micro-batch",
        f"{shorter}, or set data.packing to none and train.micro_batch_size and sharding.sequence_parallel to 1",
    )
